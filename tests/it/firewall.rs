//! The firewall of `deploy/nftables`, in network namespaces: who reaches the exchange, and what arrives there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use credbroker::proto::Outcome;
use credbroker_sim::installation::{MAIN_UID, Settings};

use crate::harness::{Bot, Lab, accounts, not_run, patient, print_always, until};
use crate::network::{
    EGRESS, Exchange, FUTURES, GRPC, Layout, Network, SERVER_OVER_IPV6, SPOT, missing,
    server_over_ipv6,
};

/// The broker's user. It needs no name.
const BROKER: u32 = 64_001;

#[test]
fn only_the_broker_reaches_the_exchange_and_only_from_the_egress_address() {
    let name = "only_the_broker_reaches_the_exchange_and_only_from_the_egress_address";
    if let Some(reason) = missing() {
        return not_run(name, "namespaces", &reason);
    }
    for layout in [Layout::Host, Layout::Gateway] {
        match Network::new(layout) {
            Ok(network) => check(layout, &Arc::new(network)),
            Err(reason) => return not_run(name, "namespaces", &reason),
        }
    }
}

fn check(layout: Layout, network: &Arc<Network>) {
    let _exchange = Exchange::start(network);
    let host = Arc::clone(network);
    let tested = network.thread("host", async move || check_on_host(layout, &host).await);
    tested.join().unwrap();
}

async fn check_on_host(layout: Layout, network: &Arc<Network>) {
    let mut lab = Lab::install(Settings {
        address: layout.source(),
        egress: format!("expected_ip = \"{EGRESS}\""),
        spot_url: Some(format!("http://{SPOT}:443")),
        futures_url: Some(format!("http://{FUTURES}:443")),
        edit: Box::new(|config| {
            let config = config.replacen("127.0.0.1:0", GRPC, 1);
            config.replace("state_dir = \"state\"", "state_dir = \"state/credbroker\"")
        }),
        config: "send_signed_requests_to_hosts_other_than_kucoin = true".to_owned(),
        keys: vec![("main", "main", MAIN_UID)],
        ..Settings::default()
    })
    .await;
    lab.is_audit_checked = false;
    let folder = lab.folder.path().display().to_string();
    let deploy = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/nftables");
    let source = layout.source();
    let rules = format!(
        "define EGRESS = {source}\ndefine BROKER = {BROKER}\ndefine GRPC = 8443\ndefine BOTS = {{ 10.20.0.0/24 }}\n\
         include \"{deploy}/credbroker.nft\"\ninclude \"{deploy}/dedicated.nft\"\n"
    );
    lab.write("firewall.nft", &rules).unwrap();
    let settings = format!("egress_address={source}\negress_gateway=10.40.0.1\negress_table=203\n");
    lab.write("firewall.conf", &settings).unwrap();
    std::fs::create_dir_all(lab.path("state/credbroker")).unwrap();
    network.run("host", &format!("chown -R {BROKER}:{BROKER} {folder}"));
    let firewall = |verb: &str| {
        let etc = format!("CREDBROKER_ETC={folder}");
        let state = format!("CREDBROKER_STATE={folder}/state");
        let script = format!("{deploy}/credbroker-firewall");
        let output = network
            .command("host", &["env", &etc, &state, &script, verb])
            .output();
        output.unwrap()
    };

    let exchange = format!("{SPOT}:443");
    let tries = [
        ("bot", 0, None, "a bot, directly"),
        ("host", 0, None, "root on the host, default source"),
        ("host", 0, Some(source), "root on the host, egress source"),
        ("host", BROKER, None, "the broker's user, default source"),
        (
            "host",
            BROKER,
            Some("10.30.0.2"),
            "the broker's user, other source",
        ),
    ];
    let unchecked = firewall("check");
    assert!(!unchecked.status.success(), "no rules: {unchecked:?}");
    network.run(
        "host",
        &format!("ip route add default via 10.40.0.1 src {source} table 203"),
    );
    network.run("host", &format!("ip rule add from {source} lookup 203"));
    for (from, user, source, who) in tries {
        let connects = network.connects(from, user, source, &exchange);
        assert!(
            connects,
            "{layout:?}: without rules, {who} must get through, or the rest proves nothing"
        );
    }
    network.run("host", &format!("ip rule del from {source} lookup 203"));
    assert!(firewall("load").status.success());
    let checked = firewall("check");
    assert!(checked.status.success(), "{checked:?}");
    let before = network.arrived();

    let user = BROKER.to_string();
    let under = [
        "setpriv",
        "--reuid",
        &user,
        "--regid",
        &user,
        "--clear-groups",
    ];
    lab.spawn_broker_under(&under).await;
    lab.until_ready().await;
    // Before the firewall knows the exchange's addresses, the source decides alone.
    assert!(!network.connects("host", 0, Some(source), &exchange));
    until(
        "the broker has written the exchange's addresses",
        async || firewall("update").status.success(),
    )
    .await;
    let known = network.run("host", "nft list set inet credbroker exchange4");
    assert!(known.contains(SPOT) && known.contains(FUTURES), "{known}");
    for (from, user, source, who) in tries {
        let connects = network.connects(from, user, source, &exchange);
        assert!(!connects, "{layout:?}: {who} reached the exchange");
    }
    assert!(!network.connects("host", BROKER, Some(source), &format!("{SPOT}:22")));
    assert!(network.connects("host", BROKER, Some(source), &exchange));
    let _server = server_over_ipv6(network);
    until("root reaches others over IPv6", async || {
        network.connects("host", 0, None, SERVER_OVER_IPV6)
    })
    .await;
    assert!(!network.connects("host", BROKER, None, SERVER_OVER_IPV6));
    let ops = format!("10.20.0.1:{}", lab.ops.port());
    assert!(
        !network.connects("bot", 0, None, &ops),
        "a bot reached another port"
    );
    assert!(
        !network.connects("gateway", 0, None, "10.30.0.2:8443"),
        "not a bot"
    );

    // A bot calls all the time, while rules and addresses are loaded again and the broker is killed.
    let is_over = Arc::<AtomicBool>::default();
    let (over, identity) = (Arc::clone(&is_over), lab.ca.bot("maker").unwrap());
    let roots = [lab.ca.certificate_pem().to_owned()];
    let calls = network.thread("bot", async move || {
        let (mut answered, mut failed) = (0, 0);
        while !over.load(Ordering::Relaxed) {
            let Ok(connection) = patient(GRPC.parse().unwrap(), &roots, &identity).await else {
                failed += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let mut bot = Bot::over(connection);
            while !over.load(Ordering::Relaxed) {
                match bot.send(accounts()).await {
                    Ok(answer) if answer.outcome() == Outcome::Accepted => answered += 1,
                    _ => {
                        failed += 1;
                        break;
                    }
                }
            }
        }
        (answered, failed)
    });
    for _ in 0..40 {
        assert!(firewall("load").status.success());
        let updated = firewall("update");
        assert!(updated.status.success(), "{updated:?}");
        assert!(
            !network.connects("host", 0, Some(source), &exchange),
            "open during a reload"
        );
    }
    let killed = lab.process.take().unwrap();
    network.run("host", &format!("kill -9 {}", killed.id()));
    drop(killed);
    lab.spawn_broker_under(&under).await;
    lab.until_ready().await;
    is_over.store(true, Ordering::Relaxed);
    let (answered, failed) = calls.join().unwrap();
    let after = network.arrived();
    let [from_egress, from_others, other_kinds] = [0, 1, 2].map(|kind| after[kind] - before[kind]);
    print_always(&format!(
        "firewall, {layout:?}: {answered} calls answered, {failed} failed over kill -9; at the exchange {from_egress} packets from the egress \
         address, {from_others} from others, {other_kinds} of other kinds"
    ));
    assert!(answered > 100 && from_egress > 100);
    assert_eq!((from_others, other_kinds), (0, 0));
    // From the restart alone.
    assert!(failed < answered / 10, "{failed} of {answered}");

    assert!(firewall("unload").status.success());
    assert!(network.connects("host", 0, None, &exchange));
}
