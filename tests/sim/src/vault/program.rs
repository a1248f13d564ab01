//! The simulator as a program: its arguments, and a start from them.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use super::{InitialState, VaultSettings, VaultSim};

/// Arguments of the simulated Vault.
#[derive(Clone, Debug, clap::Args)]
pub struct VaultArgs {
    /// Where to listen: loopback only, port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8200")]
    pub listen: SocketAddr,
    /// The root token. Not a secret: the simulator guards nothing.
    #[arg(long, default_value = "sim-root")]
    pub root_token: String,
    /// KV version 2 mount to begin with.
    #[arg(long, default_value = "kv")]
    pub mount: String,
    /// Secret to begin with: its path in the mount, and a JSON file with its fields. May be repeated.
    #[arg(long, value_name = "PATH=FILE")]
    pub put: Vec<String>,
}

/// Starts a dev server as the arguments say.
///
/// Fails when the address is not loopback or taken, or a file of `--put` cannot be read as a JSON object.
pub async fn serve(args: VaultArgs) -> io::Result<VaultSim> {
    let secrets = args
        .put
        .iter()
        .map(|put| read_secret(put))
        .collect::<io::Result<Vec<_>>>()?;
    let sim = VaultSim::start(VaultSettings {
        address: args.listen,
        state: InitialState::Dev {
            root_token: args.root_token,
        },
        ..VaultSettings::default()
    })
    .await?;
    sim.mount_kv(&args.mount);
    for (path, data) in secrets {
        sim.put_secret(&args.mount, &path, serde_json::Value::Object(data));
    }
    Ok(sim)
}

type Fields = serde_json::Map<String, serde_json::Value>;

fn read_secret(put: &str) -> io::Result<(String, Fields)> {
    let invalid = |problem: String| io::Error::new(io::ErrorKind::InvalidInput, problem);
    let (path, file) = put
        .split_once('=')
        .ok_or_else(|| invalid(format!("--put wants PATH=FILE, not {put:?}")))?;
    let text = std::fs::read(Path::new(file))
        .map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))?;
    let data = serde_json::from_slice(&text)
        .map_err(|error| invalid(format!("{file}: not a JSON object: {error}")))?;
    Ok((path.to_owned(), data))
}
