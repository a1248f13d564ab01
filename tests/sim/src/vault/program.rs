//! The simulator as a program: its arguments and its start.

use std::io;
use std::net::SocketAddr;
use std::path::Path;

use super::{InitialState, VaultSettings, VaultSim};

/// Arguments of the simulated Vault.
#[derive(Clone, Debug, clap::Args)]
pub struct VaultArgs {
    /// Address to listen on: loopback only, port 0 picks a free port
    #[arg(long, default_value = "127.0.0.1:8200")]
    pub listen: SocketAddr,
    /// The root token; not a secret, as the simulator protects nothing
    #[arg(long, default_value = "sim-root")]
    pub root_token: String,
    /// KV version 2 mount to create
    #[arg(long, default_value = "kv")]
    pub mount: String,
    /// Secret to write: its path in the mount and a JSON file with its fields; may be repeated
    #[arg(long, value_name = "PATH=FILE")]
    pub put: Vec<String>,
}

/// Starts a dev server with these arguments.
///
/// Fails if the address is not loopback or is in use, or if a file of `--put` is not a JSON object.
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
        .ok_or_else(|| invalid(format!("--put: expected PATH=FILE, got {put:?}")))?;
    let text = std::fs::read(Path::new(file))
        .map_err(|error| io::Error::new(error.kind(), format!("{file}: {error}")))?;
    let data = serde_json::from_slice(&text)
        .map_err(|error| invalid(format!("{file}: not a JSON object: {error}")))?;
    Ok((path.to_owned(), data))
}
