//! Starts everything in one command: `cargo run --locked --example demo`.
//!
//! A simulated Vault, a simulated KuCoin, a throw-away CA, the real broker, and a bot that trades through it. Each step
//! prints what the bot sent, what the broker signed and what came back. Then everything keeps running for your own calls.
//! With `--once` the demo exits after the steps.

use std::fs::Permissions;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, ensure};
use credbroker::config::Config;
use credbroker::proto::broker_client::BrokerClient;
use credbroker::proto::{
    Method, Outcome, QueryParameter, Scope, SignAndSendRequest, SignAndSendResponse,
};
use credbroker::server::Server;
use credbroker::telemetry::{LogFormat, init_logs};
use credbroker_sim::installation::{Installation, ROOT_TOKEN, Settings, secret};
use credbroker_sim::kucoin::{Fault, FaultAction, KucoinSettings, ReceivedRequest, SimKey, When};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};
use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic_types::StatusExt;

const RULES: &str = r#"
[account.alpha]
key = { spot-margin = "main" }

[account.beta]
key = { futures = "main" }

[[grant]]
bot = "spiffe://demo.test/bot/demo"
account = "alpha"
scope = "spot-margin"
allow = ["public", "read", "trade"]

[[grant]]
bot = "spiffe://demo.test/bot/demo"
account = "beta"
scope = "futures"
allow = ["public", "read", "trade"]
"#;

/// The accounts of the demo and their uids at the simulated KuCoin.
const ACCOUNTS: [(&str, u64); 2] = [("alpha", 1001), ("beta", 1002)];

/// Account and scope of the spot steps.
const SPOT: (&str, Scope) = ("alpha", Scope::SpotMargin);

/// Account and scope of the futures steps, with another key and another host.
const FUTURES: (&str, Scope) = ("beta", Scope::Futures);

macro_rules! say {
    ($($text:tt)*) => { writeln!(io::stdout(), $($text)*)? };
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let once = std::env::args().any(|argument| argument == "--once");
    // No warnings: the output below explains the lost answer, so the broker's warning would be redundant.
    init_logs("error", LogFormat::Text)?;
    let folder = tempfile::Builder::new()
        .prefix("credbroker-demo-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir()?;
    let demo = Demo::start(folder).await?;
    demo.trade().await?;
    demo.fail().await?;
    if !once {
        demo.print_commands()?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        tokio::select! {
            interrupt = tokio::signal::ctrl_c() => interrupt?,
            _ = terminate.recv() => {}
            _ = hang_up.recv() => {}
        }
    }
    demo.server.stop().await;
    demo.installation.folder.close()?;
    say!("\nStopped. All files of the demo were removed.");
    Ok(())
}

struct Demo {
    installation: Installation,
    server: Server,
    bot: BrokerClient<Channel>,
}

impl Demo {
    async fn start(folder: TempDir) -> anyhow::Result<Self> {
        say!(
            "credbroker demo: the broker is real; Vault and KuCoin are simulated. No order leaves this machine.\n"
        );
        let settings = Settings {
            rules: RULES.to_owned(),
            vault: "prefix = \"kucoin/demo\"".to_owned(),
            reload: "",
            kucoin: KucoinSettings::default(),
            keys: Vec::new(),
            ..Settings::default()
        };
        let installation = Installation::start(settings, folder).await?;
        let Installation {
            vault,
            kucoin,
            ca,
            folder,
            ..
        } = &installation;
        for (account, uid) in ACCOUNTS {
            // Restricted to the broker's address, as real keys should be.
            let key = SimKey {
                ip_whitelist: vec![Ipv4Addr::LOCALHOST.into()],
                ..SimKey::fake(uid)
            };
            vault.put_secret("kv", &format!("kucoin/demo/{account}/main"), secret(&key));
            kucoin.add_key(key);
        }
        say!(
            "simulated Vault            {}   has the keys of accounts alpha and beta",
            vault.address()
        );
        say!("simulated KuCoin, spot     {}", kucoin.spot_url());
        say!("simulated KuCoin, futures  {}", kucoin.futures_url());

        let bot = ca.bot("demo")?;
        installation.write_identity("bot", &bot)?;
        let config = std::fs::read_to_string(installation.path("config.toml"))?;
        let config = Config::parse(&config, folder.path())
            .map_err(|problems| anyhow::anyhow!("{problems:?}"))?;
        let server = Server::start(config).await?;
        let admin = server.admin.context("the broker has no admin listener")?;
        installation.write_admin(&ca.admin("demo")?, admin, "ca.pem", "")?;
        say!(
            "broker                     {}   gRPC, TLS 1.3, client certificates",
            server.grpc
        );
        say!("broker, for admins         {admin}");
        say!("broker, health and metrics http://{}", server.ops);
        say!(
            "the bot                    has a certificate (spiffe://demo.test/bot/demo) and no exchange key"
        );

        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(ca.certificate_pem()))
            .identity(tonic::transport::Identity::from_pem(
                &bot.certificate_pem,
                &bot.key_pem,
            ));
        say!("certificates, rules, audit {}", folder.path().display());
        say!(
            "\nFor each call, \"in\" shows what the bot sent, \"signed\" the string that was signed (time, method, path and query,"
        );
        say!(
            "body) and the headers that the simulated KuCoin received, and \"back\" what the bot got."
        );
        let channel = Endpoint::from_shared(format!("https://{}", server.grpc))?
            .tls_config(tls)?
            .connect()
            .await?;
        let demo = Self {
            installation,
            server,
            bot: BrokerClient::new(channel),
        };
        demo.until_ready().await?;
        Ok(demo)
    }

    /// Waits until the broker is ready: the keys are loaded from Vault.
    async fn until_ready(&self) -> anyhow::Result<()> {
        let mut ready = self.server.readiness();
        while !ready.borrow_and_update().is_ready {
            ready.changed().await.context("the broker stopped")?;
        }
        Ok(())
    }

    /// Reads balances; places, looks up and cancels a spot order and a futures order.
    async fn trade(&self) -> anyhow::Result<()> {
        self.call(
            "Balances of account alpha",
            SPOT,
            Method::Get,
            "/api/v1/accounts?currency=USDT&type=trade",
            None,
        )
        .await?;
        let body = spot_order("demo-spot-1");
        self.call(
            "Place a spot order",
            SPOT,
            Method::Post,
            "/api/v1/hf/orders",
            Some(body),
        )
        .await?;
        let by_oid = "/api/v1/hf/orders/client-order/demo-spot-1?symbol=BTC-USDT";
        self.call("Look it up by clientOid", SPOT, Method::Get, by_oid, None)
            .await?;
        self.call("Cancel it", SPOT, Method::Delete, by_oid, None)
            .await?;

        let body = json!({
            "clientOid": "demo-futures-1", "side": "buy", "symbol": "XBTUSDTM", "type": "limit", "price": "10000", "size": 1,
            "leverage": 3,
        });
        let placed = self
            .call(
                "Place a futures order on account beta: another key, another host",
                FUTURES,
                Method::Post,
                "/api/v1/orders",
                Some(body),
            )
            .await?;
        let by_oid = "/api/v1/orders/byClientOid?clientOid=demo-futures-1";
        self.call("Look it up", FUTURES, Method::Get, by_oid, None)
            .await?;
        let body: Value =
            serde_json::from_slice(&placed.context("the futures order failed")?.body)?;
        let order_id = body
            .pointer("/data/orderId")
            .and_then(Value::as_str)
            .context("the answer has no order id")?;
        self.call(
            "Cancel it",
            FUTURES,
            Method::Delete,
            &format!("/api/v1/orders/{order_id}"),
            None,
        )
        .await?;

        Ok(())
    }

    /// Sends a request that the rules deny, and one whose answer is lost.
    async fn fail(&self) -> anyhow::Result<()> {
        let body = json!({"currency": "USDT", "amount": "1000000", "toAddress": "somewhere", "withdrawType": "ADDRESS"});
        let denied = self
            .call(
                "A withdrawal, which no rule grants to the bot",
                SPOT,
                Method::Post,
                "/api/v3/withdrawals",
                Some(body),
            )
            .await?;
        ensure!(denied.is_none(), "the withdrawal was not denied");

        self.installation.kucoin.fault(Fault::once(
            "/api/v1/hf/orders",
            FaultAction::Close {
                when: When::AfterProcessing,
            },
        ));
        let body = spot_order("demo-lost-1");
        let lost = self
            .call(
                "A lost answer: the simulated KuCoin accepts the order and closes the connection",
                SPOT,
                Method::Post,
                "/api/v1/hf/orders",
                Some(body),
            )
            .await?;
        ensure!(lost.is_none(), "the answer was not lost");
        say!(
            "   The broker does not send the order again, because that could buy twice. The bot looks it up by its clientOid:"
        );
        let by_oid = "/api/v1/hf/orders/client-order/demo-lost-1?symbol=BTC-USDT";
        let found = self
            .call(
                "Look up the order whose answer was lost",
                SPOT,
                Method::Get,
                by_oid,
                None,
            )
            .await?;
        ensure!(
            found.is_some_and(|answer| answer.outcome() == Outcome::Accepted),
            "the order was not found"
        );
        self.call("Cancel that order", SPOT, Method::Delete, by_oid, None)
            .await?;
        Ok(())
    }

    /// Sends a request; prints it, what was signed and what came back.
    async fn call(
        &self,
        title: &str,
        (account, scope): (&str, Scope),
        method: Method,
        target: &str,
        body: Option<Value>,
    ) -> anyhow::Result<Option<SignAndSendResponse>> {
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        let request = SignAndSendRequest {
            account: account.to_owned(),
            scope: scope.into(),
            method: method.into(),
            path: path.to_owned(),
            query: pairs
                .map(|(name, value)| QueryParameter {
                    name: name.to_owned(),
                    value: value.to_owned(),
                })
                .collect(),
            body: body.map(|body| body.to_string()).unwrap_or_default().into(),
            ..SignAndSendRequest::default()
        };
        say!("\n== {title}");
        say!(
            "   in      account {account}, {}, {} {target}",
            scope.as_str_name(),
            method.as_str_name()
        );
        if !request.body.is_empty() {
            say!("           {}", String::from_utf8_lossy(&request.body));
        }
        let before = self.installation.kucoin.received().len();
        let result = self.bot.clone().sign_and_send(request).await;
        match self.installation.kucoin.received().get(before) {
            Some(received) => say_signed(received)?,
            None => say!("   signed  nothing; no request was sent to the exchange"),
        }
        match result {
            Ok(answer) => {
                let answer = answer.into_inner();
                say!(
                    "   back    HTTP {}, code {}, {}",
                    answer.http_status,
                    answer.code,
                    answer.outcome().as_str_name()
                );
                say!("           {}", brief(&answer.body));
                Ok(Some(answer))
            }
            Err(status) => {
                say_failure(&status)?;
                Ok(None)
            }
        }
    }

    /// Prints commands for a second terminal.
    fn print_commands(&self) -> anyhow::Result<()> {
        let folder = self.installation.folder.path().display();
        let (grpc, ops) = (self.server.grpc, self.server.ops);
        say!(
            "\n== Your turn: everything keeps running until Ctrl-C. In a second terminal, in the project's folder:\n"
        );
        say!(
            "# balances with grpcurl (go install github.com/fullstorydev/grpcurl/cmd/grpcurl@latest)"
        );
        say!("grpcurl -cacert {folder}/ca.pem -cert {folder}/bot.pem -key {folder}/bot.key \\");
        say!(
            "  -d '{{\"account\":\"alpha\",\"scope\":\"SCOPE_SPOT_MARGIN\",\"method\":\"METHOD_GET\",\"path\":\"/api/v1/accounts\"}}' \\"
        );
        say!("  {grpc} credbroker.v1.Broker/SignAndSend\n");
        say!("# the bot of examples/bot.py");
        say!(
            "python3 -m venv .venv && .venv/bin/pip install --quiet grpcio grpcio-tools grpcio-status"
        );
        say!(".venv/bin/python examples/bot.py {grpc} {folder}\n");
        say!("# the bot of examples/bot.rs");
        say!("cargo run --example bot -- {grpc} {folder}\n");
        say!("# health of the keys, as the admin of {folder}/admin.toml");
        say!("cargo run -- keys list --admin {folder}/admin.toml\n");
        say!("# readiness and metrics; audit log; metadata of a key in the simulated Vault");
        say!("curl -s http://{ops}/readyz http://{ops}/metrics");
        say!("cat {folder}/state/audit.jsonl");
        say!(
            "curl -s -H 'X-Vault-Token: {ROOT_TOKEN}' {}/v1/kv/metadata/kucoin/demo/alpha/main   # simulated",
            self.installation.vault.address()
        );
        Ok(())
    }
}

fn spot_order(client_oid: &str) -> Value {
    json!({
        "clientOid": client_oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "10000", "size": "0.001",
    })
}

/// The answer, cut if it is long.
fn brief(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    match text.char_indices().nth(240) {
        Some((end, _)) => format!(
            "{}… ({} bytes)",
            text.get(..end).unwrap_or_default(),
            body.len()
        ),
        None => text.into_owned(),
    }
}

fn say_signed(received: &ReceivedRequest) -> anyhow::Result<()> {
    let header = |name| received.header(name).unwrap_or_default();
    // The signed string has the decoded query, so decode the query that was received.
    let target =
        received
            .target
            .split_once('?')
            .map_or(received.target.clone(), |(path, query)| {
                let pairs = url::form_urlencoded::parse(query.as_bytes())
                    .map(|(name, value)| format!("{name}={value}"));
                format!("{path}?{}", pairs.collect::<Vec<_>>().join("&"))
            });
    say!(
        "   signed  {}{}{target}{}",
        header("kc-api-timestamp"),
        received.method,
        String::from_utf8_lossy(&received.body)
    );
    let sign: String = header("kc-api-sign").chars().take(8).collect();
    say!(
        "           KC-API-KEY {}, KC-API-SIGN {sign}…, key version {}",
        header("kc-api-key"),
        header("kc-api-key-version")
    );
    say!(
        "           simulated KuCoin checked the signature: {:?}",
        received.signature
    );
    Ok(())
}

fn say_failure(status: &Status) -> anyhow::Result<()> {
    let info = status
        .get_details_error_info()
        .context("the failure has no ErrorInfo")?;
    let outcome = info
        .metadata
        .get("outcome")
        .map(String::as_str)
        .unwrap_or_default();
    say!(
        "   back    {:?}, reason {}, outcome {outcome}",
        status.code(),
        info.reason
    );
    say!("           {}", status.message());
    Ok(())
}
