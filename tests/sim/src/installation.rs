//! A broker's surroundings: simulated Vault and KuCoin, a throw-away CA, and the folder with the broker's files.
//!
//! Tests, benches and the demo describe with [`Settings`] how theirs differs from the usual one.

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kucoin::{KucoinSettings, KucoinSim, Limits, SimKey};
use crate::pki::{Ca, Identity};
use crate::road::Road;
use crate::vault::VaultSim;

/// The token that the simulated Vault starts with; the broker's token file holds it.
pub const ROOT_TOKEN: &str = "simulated-root-token";

/// The account whose keys the default rules use.
pub const MAIN_UID: u64 = 1001;

/// The table `[vault.auth]` of a broker that logs in with the token file.
pub const TOKEN_FILE: &str = "method = \"token_file\"\nfile = \"token\"";

/// Rules under which `maker` trades everywhere on account `main`, and `reader` only reads spot.
pub const RULES: &str = r#"
[account.main]
key = { spot-margin = "main", futures = "main", unified = "main" }

[account.other]
key = { spot-margin = "main" }

[[grant]]
bot = "spiffe://demo.test/bot/maker"
account = "main"
scope = "spot-margin"
allow = ["public", "read", "trade", "trade-config"]

[[grant]]
bot = "spiffe://demo.test/bot/maker"
account = "main"
scope = "futures"
allow = ["public", "read", "trade", "trade-config"]

[[grant]]
bot = "spiffe://demo.test/bot/maker"
account = "main"
scope = "unified"
allow = ["public", "read", "trade", "trade-config"]

[[grant]]
bot = "spiffe://demo.test/bot/reader"
account = "main"
scope = "spot-margin"
allow = ["read"]
"#;

/// How an installation differs from the usual one.
pub struct Settings {
    /// The rules file.
    pub rules: String,
    /// Further tables of the configuration, such as `[limits]`.
    pub config: String,
    /// Further keys of `[vault]`.
    pub vault: String,
    /// The keys of `[vault.auth]`.
    pub auth: String,
    /// The table `[reload]`.
    pub reload: &'static str,
    /// Further keys of `[egress]`.
    pub egress: String,
    /// `egress.address`.
    pub address: &'static str,
    /// Where the broker finds Vault; `None`: at the simulated one.
    pub vault_url: Option<String>,
    /// Where the broker finds the spot host; `None`: at the simulated KuCoin.
    pub spot_url: Option<String>,
    /// The same for the futures host.
    pub futures_url: Option<String>,
    /// Whether the spot host is reached over [`Installation::road`].
    pub road: bool,
    /// The last word on the text of the configuration.
    pub edit: Box<dyn Fn(String) -> String + Send>,
    /// Further files beside the configuration, or others in place of the usual ones: names and texts.
    pub files: Vec<(&'static str, String)>,
    /// A simulated Vault that runs already; `None`: a new one.
    pub simulated_vault: Option<VaultSim>,
    /// The CA of broker, bots and admins; `None`: a new one.
    pub ca: Option<Ca>,
    /// How the simulated KuCoin starts.
    pub kucoin: KucoinSettings,
    /// Keys that Vault and KuCoin hold from the start: account, key name, KuCoin uid.
    pub keys: Vec<(&'static str, &'static str, u64)>,
    /// Whether the broker runs as the real program, in a process of its own.
    pub process: bool,
    /// Whether to wait until the broker is ready.
    pub wait_ready: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rules: RULES.to_owned(),
            config: String::new(),
            vault: "poll_s = 1\ntimeout_ms = 1000".to_owned(),
            auth: TOKEN_FILE.to_owned(),
            reload: "[reload]\nevery_ms = 50\n",
            egress: String::new(),
            address: "127.0.0.1",
            vault_url: None,
            spot_url: None,
            futures_url: None,
            road: false,
            edit: Box::new(|config| config),
            files: Vec::new(),
            simulated_vault: None,
            ca: None,
            kucoin: KucoinSettings {
                limits: Limits::none(),
                ..KucoinSettings::default()
            },
            keys: vec![("main", "main", MAIN_UID), ("other", "main", 1002)],
            process: false,
            wait_ready: true,
        }
    }
}

/// Simulators that run, and the files of a broker that has not started.
#[derive(Debug)]
pub struct Installation {
    /// The simulated Vault.
    pub vault: VaultSim,
    /// The simulated KuCoin.
    pub kucoin: KucoinSim,
    /// The CA of broker, bots and admins.
    pub ca: Ca,
    /// The way to the spot host, where the settings ask for one.
    pub road: Option<Road>,
    /// Where the broker's files are.
    pub folder: TempDir,
}

impl Installation {
    /// Starts the simulators and writes the broker's files into `folder`.
    pub async fn start(settings: Settings, folder: TempDir) -> io::Result<Self> {
        let vault = match settings.simulated_vault {
            Some(vault) => vault,
            None => VaultSim::start_dev(ROOT_TOKEN).await?,
        };
        vault.mount_kv("kv");
        let kucoin = KucoinSim::start(settings.kucoin).await?;
        let ca = match settings.ca {
            Some(ca) => ca,
            None => Ca::new("throw-away CA").map_err(io::Error::other)?,
        };
        let mut spot = settings.spot_url.unwrap_or_else(|| kucoin.spot_url());
        let mut road = None;
        if settings.road {
            let new = Road::to(&spot).await?;
            let scheme = spot.split("//").next().unwrap_or_default();
            spot = format!("{scheme}//{}", new.address);
            road = Some(new);
        }
        let installation = Self {
            vault,
            kucoin,
            ca,
            road,
            folder,
        };
        for (account, name, uid) in settings.keys {
            installation.add_key(account, name, &SimKey::fake(uid));
        }
        let identity = installation.ca.server().map_err(io::Error::other)?;
        installation.write_identity("server", &identity)?;
        let config = format!(
            r#"rules = "rules.toml"
state_dir = "state"

[listen]
grpc = "127.0.0.1:0"
ops = "127.0.0.1:0"
admin = "127.0.0.1:0"

[tls]
certificate = "server.pem"
key = "server.key"
client_ca = "ca.pem"

[vault]
address = "{vault}"
{vault_keys}

[vault.auth]
{auth}

{reload}
[egress]
address = "{address}"
{egress}

[exchange]
spot = "{spot}"
futures = "{futures}"

{config}"#,
            vault = settings
                .vault_url
                .unwrap_or_else(|| installation.vault.address()),
            vault_keys = settings.vault,
            auth = settings.auth,
            reload = settings.reload,
            address = settings.address,
            egress = settings.egress,
            futures = settings
                .futures_url
                .unwrap_or_else(|| installation.kucoin.futures_url()),
            config = settings.config,
        );
        // What is empty above leaves no blank lines.
        let config = config.trim_end().replace("\n\n\n", "\n\n") + "\n";
        installation.write("config.toml", &(settings.edit)(config))?;
        installation.write("rules.toml", &settings.rules)?;
        installation.write("token", &format!("{ROOT_TOKEN}\n"))?;
        installation.write("ca.pem", installation.ca.certificate_pem())?;
        for (name, text) in &settings.files {
            installation.write(name, text)?;
        }
        Ok(installation)
    }

    /// Gives a key to both Vault and KuCoin; returns its version in Vault.
    pub fn add_key(&self, account: &str, name: &str, key: &SimKey) -> u64 {
        self.kucoin.add_key(key.clone());
        self.put_key(account, name, key)
    }

    /// Gives a key to Vault; returns its version.
    pub fn put_key(&self, account: &str, name: &str, key: &SimKey) -> u64 {
        let path = kv_path(account, name);
        self.vault.put_secret("kv", &path, secret(key))
    }

    /// The path of a file of the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file that nobody else can read: the broker and its commands refuse secrets that others can.
    pub fn write(&self, name: &str, text: &str) -> io::Result<()> {
        fs::write(self.path(name), text)?;
        fs::set_permissions(self.path(name), Permissions::from_mode(0o600))
    }

    /// Replaces a file as an agent does: writes it aside and moves it in place.
    pub fn replace(&self, name: &str, text: &str) -> io::Result<()> {
        let aside = format!("{name}.new");
        self.write(&aside, text)?;
        fs::rename(self.path(&aside), self.path(name))
    }

    /// Writes a certificate and its key: `name.pem` and `name.key`.
    pub fn write_identity(&self, name: &str, identity: &Identity) -> io::Result<()> {
        self.write(&format!("{name}.pem"), &identity.certificate_pem)?;
        self.write(&format!("{name}.key"), &identity.key_pem)
    }

    /// Writes `admin.toml` and the admin's certificate. The file `ca` holds the CA of the broker's certificate; `more` are
    /// further tables.
    pub fn write_admin(
        &self,
        admin: &Identity,
        broker: SocketAddr,
        ca: &str,
        more: &str,
    ) -> io::Result<()> {
        self.write_identity("admin", admin)?;
        let text = format!(
            "broker = \"{broker}\"\nca = \"{ca}\"\ncertificate = \"admin.pem\"\nkey = \"admin.key\"\n{more}"
        );
        self.write("admin.toml", &text)
    }
}

/// What Vault holds for a key.
pub fn secret(key: &SimKey) -> Value {
    json!({
        "api_key": key.api_key, "api_secret": key.api_secret, "passphrase": key.passphrase,
        "key_version": key.version, "partner_key": key.partners.first().map(|partner| &partner.key),
    })
}

/// Where Vault holds a key, below the mount.
pub fn kv_path(account: &str, name: &str) -> String {
    format!("kucoin/prod/{account}/{name}")
}

/// A grant of the rules: `allow` is a list such as `"read", "trade"`.
pub fn grant(bot: &str, account: &str, scope: &str, allow: &str) -> String {
    format!(
        "\n[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"{account}\"\nscope = \"{scope}\"\nallow = [{allow}]\n"
    )
}
