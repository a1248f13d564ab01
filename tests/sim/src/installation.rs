//! Everything that a broker needs: simulated Vault and KuCoin, a throw-away CA, and a folder with the broker's files.
//!
//! Tests, benches and the demo change the default with [`Settings`].

use std::fs::{self, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::kucoin::{KucoinSettings, KucoinSim, Limits, SimKey};
use crate::pki::{Ca, Identity};
use crate::proxy::Proxy;
use crate::vault::VaultSim;

/// The root token of the simulated Vault, written to the broker's token file.
pub const ROOT_TOKEN: &str = "simulated-root-token";

/// KuCoin uid of account `main`, whose keys the default rules use.
pub const MAIN_UID: u64 = 1001;

/// The settings of `[vault.auth]` for a broker that uses the token file.
pub const TOKEN_FILE: &str = "method = \"token_file\"\nfile = \"token\"";

/// Rules that let `maker` trade in every scope of account `main` and `reader` only read spot.
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

/// The settings of an installation.
pub struct Settings {
    /// The rules file.
    pub rules: String,
    /// Further tables of the configuration, such as `[limits]`.
    pub config: String,
    /// Further settings of `[vault]`.
    pub vault: String,
    /// The settings of `[vault.auth]`.
    pub auth: String,
    /// The table `[reload]`.
    pub reload: &'static str,
    /// Further settings of `[egress]`.
    pub egress: String,
    /// `egress.address`.
    pub address: &'static str,
    /// URL of Vault; `None`: the simulated one.
    pub vault_url: Option<String>,
    /// URL of the spot host; `None`: the simulated KuCoin.
    pub spot_url: Option<String>,
    /// URL of the futures host; `None`: the simulated KuCoin.
    pub futures_url: Option<String>,
    /// Whether the broker connects to the spot host through the proxy [`Installation::proxy`].
    pub proxy: bool,
    /// Edits the text of the configuration before it is written.
    pub edit: Box<dyn Fn(String) -> String + Send>,
    /// Files to add or replace in the folder: names and texts.
    pub files: Vec<(&'static str, String)>,
    /// A simulated Vault that is already running; `None`: a new one.
    pub simulated_vault: Option<VaultSim>,
    /// The CA of broker, bots and admins; `None`: a new one.
    pub ca: Option<Ca>,
    /// Settings of the simulated KuCoin.
    pub kucoin: KucoinSettings,
    /// Keys to add to Vault and KuCoin at the start: account, key name, KuCoin uid.
    pub keys: Vec<(&'static str, &'static str, u64)>,
    /// Whether to run the broker as a separate process.
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
            proxy: false,
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

/// Running simulators, and the files of a broker that is not started yet.
#[derive(Debug)]
pub struct Installation {
    /// The simulated Vault.
    pub vault: VaultSim,
    /// The simulated KuCoin.
    pub kucoin: KucoinSim,
    /// The CA of broker, bots and admins.
    pub ca: Ca,
    /// The proxy in front of the spot host, if the settings ask for one.
    pub proxy: Option<Proxy>,
    /// The folder with the broker's files.
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
        let mut proxy = None;
        if settings.proxy {
            let new = Proxy::to(&spot).await?;
            let scheme = spot.split("//").next().unwrap_or_default();
            spot = format!("{scheme}//{}", new.address);
            proxy = Some(new);
        }
        let installation = Self {
            vault,
            kucoin,
            ca,
            proxy,
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
        // Empty settings above leave no extra blank lines.
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

    /// Adds a key to KuCoin and Vault; returns its version in Vault.
    pub fn add_key(&self, account: &str, name: &str, key: &SimKey) -> u64 {
        self.kucoin.add_key(key.clone());
        self.put_key(account, name, key)
    }

    /// Writes a key to Vault; returns its version.
    pub fn put_key(&self, account: &str, name: &str, key: &SimKey) -> u64 {
        let path = kv_path(account, name);
        self.vault.put_secret("kv", &path, secret(key))
    }

    /// The path of a file in the folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Writes a file with mode 0600: the broker and its commands refuse secrets that other users can read.
    pub fn write(&self, name: &str, text: &str) -> io::Result<()> {
        fs::write(self.path(name), text)?;
        fs::set_permissions(self.path(name), Permissions::from_mode(0o600))
    }

    /// Replaces a file atomically, as an agent does: writes a new file and renames it.
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

/// The fields of a key in Vault.
pub fn secret(key: &SimKey) -> Value {
    json!({
        "api_key": key.api_key, "api_secret": key.api_secret, "passphrase": key.passphrase,
        "key_version": key.version, "partner_key": key.partners.first().map(|partner| &partner.key),
    })
}

/// The path of a key in Vault, below the mount.
pub fn kv_path(account: &str, name: &str) -> String {
    format!("kucoin/prod/{account}/{name}")
}

/// A grant of the rules: `allow` is a list such as `"read", "trade"`.
pub fn grant(bot: &str, account: &str, scope: &str, allow: &str) -> String {
    format!(
        "\n[[grant]]\nbot = \"spiffe://demo.test/bot/{bot}\"\naccount = \"{account}\"\nscope = \"{scope}\"\nallow = [{allow}]\n"
    )
}
