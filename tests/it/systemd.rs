//! `deploy/install.sh` on a fresh Debian under a booted systemd, in a container: the units, the watchdog, restarts, and the removal.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use credbroker::proto::Outcome;
use credbroker_sim::installation::Settings;
use credbroker_sim::kucoin::KucoinSim;
use credbroker_sim::vault::RoleSettings;
use serde_json::Value;

use crate::harness::{Bot, Lab, accounts, not_run, patient, print_always, until};
use crate::network::{EGRESS, Exchange, FUTURES, GRPC, Layout, Network, SPOT, key, missing};

/// Rules for bot `maker`.
const RULES: &str = r#"
[account.main]
key = { spot-margin = "main", futures = "main", unified = "main" }

[[grant]]
bot = "spiffe://demo.test/bot/maker"
account = "main"
scope = "spot-margin"
allow = ["public", "read", "trade"]

[[grant]]
bot = "spiffe://demo.test/bot/maker"
account = "main"
scope = "futures"
allow = ["read"]

[[grant]]
bot = "spiffe://demo.test/bot/maker"
account = "main"
scope = "unified"
allow = ["read"]
"#;

/// The Debian that `tests/deploy/setup.sh` has made.
const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/debian");

/// A container with a Debian of its own, which has the network of a host.
struct Machine {
    nspawn: Child,
    systemd: String,
    root: tempfile::TempDir,
}

impl Machine {
    /// Boots it. `folders`: what it sees read-only, below `/opt`.
    async fn boot(network: &Network, folders: &[(&str, &str)]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let mut copy = Command::new("cp");
        copy.args(["-a", &format!("{ROOT}/.")]).arg(root.path());
        assert!(copy.status().unwrap().success());
        let mut nspawn = Command::new("systemd-nspawn");
        nspawn.args([
            "--register=no",
            "--keep-unit",
            "--quiet",
            "--boot",
            "--console=pipe",
        ]);
        nspawn
            .args(["--capability=all", "--directory"])
            .arg(root.path());
        nspawn.arg(format!(
            "--network-namespace-path=/run/netns/{}-host",
            network.0
        ));
        for (outside, inside) in folders {
            nspawn.arg(format!("--bind-ro={outside}:/opt/{inside}"));
        }
        nspawn.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1");
        nspawn.stdin(Stdio::null()).stdout(Stdio::null());
        let nspawn = nspawn.spawn().unwrap();
        let mut machine = Self {
            nspawn,
            systemd: String::new(),
            root,
        };
        until("the container has started", async || {
            machine.find_systemd().is_some()
        })
        .await;
        machine.systemd = machine.find_systemd().unwrap();
        until("the container has booted", async || {
            let state = machine.output("systemctl is-system-running");
            let state = String::from_utf8_lossy(&state.stdout);
            ["running", "degraded"].contains(&state.trim())
        })
        .await;
        machine
    }

    /// The process id of its systemd: not that of a child of nspawn, which starts it and exits.
    fn find_systemd(&self) -> Option<String> {
        let nspawn = self.nspawn.id();
        let children = std::fs::read_to_string(format!("/proc/{nspawn}/task/{nspawn}/children"));
        let children = children.unwrap_or_default();
        let mut children = children.split_whitespace();
        let is_systemd = |child: &&str| {
            let name = std::fs::read_to_string(format!("/proc/{child}/comm"));
            name.is_ok_and(|name| name.trim() == "systemd")
        };
        children.find(is_systemd).map(str::to_owned)
    }

    fn output(&self, command: &str) -> Output {
        let mut enter = Command::new("nsenter");
        enter.args([
            "--target",
            &self.systemd,
            "-m",
            "-u",
            "-i",
            "-n",
            "-p",
            "-C",
        ]);
        enter.args(["sh", "-c", command]).output().unwrap()
    }

    /// Its output, if it succeeds.
    fn run(&self, command: &str) -> String {
        let output = self.output(command);
        let (out, error) = (output.stdout, output.stderr);
        let [out, error] = [out, error].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        assert!(output.status.success(), "{command}: {out}{error}");
        out
    }

    fn fails(&self, command: &str) -> String {
        let output = self.output(command);
        assert!(!output.status.success(), "{command} succeeded");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// The process id of the broker, and how often systemd has restarted it.
    fn broker(&self) -> (String, u32) {
        let shown = self.run("systemctl show -P MainPID -P NRestarts credbroker");
        let mut lines = shown.lines();
        let pid = lines.next().unwrap().to_owned();
        (pid, lines.next().unwrap().parse().unwrap())
    }

    fn path(&self, inside: &str) -> PathBuf {
        self.root.path().join(inside.trim_start_matches('/'))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // nspawn ends with its systemd, and its systemd with it.
        if !self.systemd.is_empty() {
            let _ = Command::new("kill").args(["-9", &self.systemd]).status();
            for _ in 0..100 {
                if matches!(self.nspawn.try_wait(), Ok(Some(_))) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        let _ = self.nspawn.kill();
        let _ = self.nspawn.wait();
    }
}

#[test]
fn installs_runs_restarts_and_removes_the_broker_under_systemd() {
    let name = "installs_runs_restarts_and_removes_the_broker_under_systemd";
    if let Some(reason) = missing() {
        return not_run(name, "systemd", &reason);
    }
    if !Path::new(ROOT).exists() {
        return not_run(
            name,
            "systemd",
            "no target/debian; run tests/deploy/setup.sh",
        );
    }
    let network = match Network::new(Layout::Host) {
        Ok(network) => Arc::new(network),
        Err(reason) => return not_run(name, "systemd", &reason),
    };
    let exchange = Exchange::start(&network);
    let (host, sim) = (Arc::clone(&network), Arc::clone(&exchange.sim));
    let tested = network.thread("host", async move || check(&host, &sim).await);
    tested.join().unwrap();
}

async fn check(network: &Arc<Network>, exchange: &KucoinSim) {
    let mut lab = Lab::install(Settings {
        address: EGRESS,
        auth: "method = \"approle\"\nrole_id = \"ROLE\"\nsecret_id_file = \"/run/credentials/credbroker.service/secret-id\""
            .to_owned(),
        spot_url: Some(format!("http://{SPOT}:443")),
        futures_url: Some(format!("http://{FUTURES}:443")),
        edit: Box::new(|config| {
            let config = config.replacen("127.0.0.1:0", GRPC, 1);
            let config = config.replacen("127.0.0.1:0", "127.0.0.1:9464", 1);
            let config = config.replace("state_dir = \"state\"", "state_dir = \"/var/lib/credbroker\"");
            config.replace("\"server.", "\"tls/server.").replace("\"ca.pem", "\"tls/ca.pem")
        }),
        config: "send_signed_requests_to_hosts_other_than_kucoin = true".to_owned(),
        rules: RULES.to_owned(),
        keys: Vec::new(),
        ..Settings::default()
    })
    .await;
    lab.is_audit_checked = false;
    lab.grpc = GRPC.parse().unwrap();
    lab.ops = ([127, 0, 0, 1], 9464).into();
    lab.put_key("main", "main", &key());
    // Like the policy deploy/vault/broker.hcl.
    lab.vault.deny(None, Some("POST"), "kv/*");
    let (role_id, secret_id) = lab
        .vault
        .enable_approle("credbroker", RoleSettings::default());
    lab.reconfigure("\"ROLE\"", &format!("\"{role_id}\""));
    lab.write("secret-id", &secret_id).unwrap();
    std::fs::create_dir(lab.path("tls")).unwrap();
    for file in ["server.pem", "server.key", "ca.pem"] {
        std::fs::copy(lab.path(file), lab.path("tls").join(file)).unwrap();
    }
    let answers = format!(
        "binary=/opt/bin/credbroker\nconfig=/opt/lab/config.toml\nrules=/opt/lab/rules.toml\ntls=/opt/lab/tls\nsecret_id=/opt/lab/secret-id\n\
         listen={GRPC}\nbots=10.20.0.0/24\negress_address={EGRESS}\negress_gateway=10.40.0.1\n"
    );
    lab.write("answers", &answers).unwrap();
    let programs = Path::new(env!("CARGO_BIN_EXE_credbroker"))
        .parent()
        .unwrap();
    let machine = Machine::boot(
        network,
        &[
            (concat!(env!("CARGO_MANIFEST_DIR"), "/deploy"), "deploy"),
            (programs.to_str().unwrap(), "bin"),
            (lab.folder.path().to_str().unwrap(), "lab"),
        ],
    )
    .await;

    let install = "/opt/deploy/install.sh --answers /opt/lab/answers";
    machine.run(&format!("{install} --dry-run"));
    machine.run("test ! -e /usr/local/bin/credbroker && test ! -e /etc/credbroker && ! id credbroker 2>/dev/null");
    let wrong = "sed 's/^bots=.*/bots=10.20.0.0\\/99/' /opt/lab/answers > /tmp/wrong && /opt/deploy/install.sh --answers /tmp/wrong";
    let refused = machine.fails(wrong);
    assert!(
        refused.contains("the firewall's rules are not valid"),
        "{refused}"
    );
    machine.run("test ! -e /usr/local/bin/credbroker && test ! -e /etc/credbroker");
    machine.run(install);
    lab.until_ready().await;
    let again = machine.run(install);
    assert!(again.ends_with("done: nothing changed\n"), "{again}");
    let score = "systemd-analyze security --offline=true --threshold=12 /etc/systemd/system/credbroker.service";
    machine.run(score);

    // Memory cannot be locked where systemd may not raise the limit, such as in this container.
    let doctor = machine.run(
        "setpriv --reuid credbroker --regid credbroker --clear-groups credbroker doctor --config /etc/credbroker/config.toml",
    );
    let problems = doctor
        .lines()
        .filter(|line| line.starts_with("failed") || line.starts_with("warning"));
    let problems: Vec<_> = problems
        .filter(|line| !line.starts_with("warning  memory"))
        .collect();
    assert!(problems.is_empty(), "{problems:?} in {doctor}");
    let identity = lab.ca.bot("maker").unwrap();
    let roots = [lab.ca.certificate_pem().to_owned()];
    let call = async || {
        let (roots, identity) = (roots.clone(), identity.clone());
        let called = network.thread("bot", async move || {
            let connection = patient(GRPC.parse().unwrap(), &roots, &identity)
                .await
                .unwrap();
            Bot::over(connection)
                .send(accounts())
                .await
                .unwrap()
                .outcome()
        });
        assert_eq!(called.join().unwrap(), Outcome::Accepted);
    };
    call().await;
    until("the firewall knows the exchange's addresses", async || {
        machine
            .run("nft list set inet credbroker exchange4")
            .contains(SPOT)
    })
    .await;

    restart_under_load(network, exchange, &machine, &lab);

    // A broker that hangs is killed by the watchdog; one that is killed starts again. Calls wait meanwhile.
    machine.run("mkdir -p /etc/systemd/system/credbroker.service.d && printf '[Service]\\nWatchdogSec=8\\n' > /etc/systemd/system/credbroker.service.d/test.conf && systemctl daemon-reload && systemctl restart credbroker");
    for signal in ["STOP", "KILL"] {
        let before = machine.broker();
        machine.run(&format!("kill -{signal} {}", before.0));
        call().await;
        let after = machine.broker();
        assert_ne!(after.0, before.0);
        assert_eq!(after.1, before.1 + 1, "SIG{signal}");
    }
    machine.run("journalctl -u credbroker | grep -q 'Watchdog timeout'");

    // No rules, no broker.
    machine.run("nft delete table inet credbroker");
    let started = machine.fails("systemctl restart credbroker");
    assert!(started.contains("control process exited"), "{started}");
    machine.run("systemctl reload credbroker-firewall && systemctl restart credbroker");
    call().await;

    // Debian's own rules remove all tables when they are loaded.
    machine.run("grep -q '^flush ruleset' /etc/nftables.conf && systemctl start nftables");
    for _ in 0..10 {
        machine.run("systemctl reload nftables; nft list chain inet credbroker exchange");
    }
    call().await;

    // What has been changed or comes from elsewhere is not replaced.
    machine.run("echo >> /etc/systemd/system/credbroker.service");
    let refused = machine.fails(install);
    assert!(
        refused.contains("credbroker.service was changed after it was installed"),
        "{refused}"
    );

    machine.run("/opt/deploy/install.sh --uninstall");
    let left = machine.run("find / -xdev -name '*credbroker*' -not -path '/proc/*' -not -path '/opt/*' -not -path '/sys/*' | sort");
    print_always(&format!(
        "systemd: left after --uninstall: {}",
        left.trim().replace('\n', ", ")
    ));
    machine.run(
        "! nft list table inet credbroker 2>/dev/null && test -f /var/lib/credbroker/audit.jsonl",
    );
    assert!(machine.path("/etc/credbroker/config.toml").exists());
    let refused = machine.fails("/opt/deploy/install.sh --uninstall");
    assert!(refused.contains("nothing is installed"), "{refused}");
}

/// Restarts the broker while bots in Python and Go, which wait for it as docs/bots.md says, send 100 calls per second together.
fn restart_under_load(network: &Network, exchange: &KucoinSim, machine: &Machine, lab: &Lab) {
    const ROOT: &str = env!("CARGO_MANIFEST_DIR");
    let (python, go) = (
        format!("{ROOT}/.venv/bin/python"),
        format!("{ROOT}/target/waiting-bot"),
    );
    let script = format!("{ROOT}/tests/python/waiting_bot.py");
    let clients = [("python", vec![&*python, &*script]), ("go", vec![&*go])];
    lab.write_identity("bot", &lab.ca.bot("maker").unwrap())
        .unwrap();
    let folder = lab.folder.path().to_str().unwrap();
    let before = exchange.received().len();
    let mut bots = Vec::new();
    for (name, mut words) in clients {
        if !Path::new(words[0]).exists() {
            let reason = format!("there is no {}", words[0]);
            not_run("restart_under_load", name, &reason);
            continue;
        }
        words.extend([GRPC, folder, "9", "25"]);
        let mut bot = network.command("bot", &words);
        bots.push((name, bot.stdout(Stdio::piped()).spawn().unwrap()));
    }
    let orders = || {
        let received = exchange.received().split_off(before);
        let orders = received
            .into_iter()
            .filter(|request| request.method == "POST");
        orders.map(|request| request.body).collect::<Vec<_>>()
    };
    while orders().len() < 50 * bots.len() {
        for (name, bot) in &mut bots {
            assert!(
                bot.try_wait().unwrap().is_none(),
                "the bot in {name} has ended"
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    for _ in 0..2 {
        machine.run("systemctl restart credbroker");
    }
    let expected = 225 * bots.len();
    for (name, bot) in bots {
        let output = bot.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        print_always(&format!(
            "systemd: two restarts under load, {name}: {}",
            text.trim()
        ));
        let result: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(
            (&result["calls"], &result["failed"]),
            (&450.into(), &0.into())
        );
    }
    let mut orders = orders();
    assert_eq!(orders.len(), expected);
    orders.sort();
    orders.dedup();
    assert_eq!(orders.len(), expected, "an order was sent twice");
}
