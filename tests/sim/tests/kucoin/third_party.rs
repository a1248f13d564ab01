//! KuCoin's official SDK and ccxt, both in Python, with their real signing code.

use std::io::Write;
use std::path::Path;

use credbroker_sim::kucoin::{Host, KucoinSettings, KucoinSim, Partner, Signature, SimKey};

#[tokio::test]
async fn official_sdk_and_ccxt_trade_with_the_simulator() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let python = root.join(".venv/bin/python");
    if !python.exists() {
        let note = "exchange clients: not run (no .venv; run tests/python/setup.sh)";
        let required = std::env::var_os("CREDBROKER_REQUIRE").unwrap_or_default();
        let required = required.to_string_lossy();
        assert!(
            !required.split(',').any(|name| name.trim() == "python"),
            "{note}"
        );
        writeln!(std::io::stderr(), "{note}").unwrap();
        return;
    }
    let sim = KucoinSim::start(KucoinSettings::default()).await.unwrap();
    let partner = |id: &str| Partner {
        id: id.to_owned(),
        key: format!("key of {id}"),
    };
    let key = SimKey {
        partners: vec![partner("simulated-spot"), partner("simulated-futures")],
        ..SimKey::fake(11)
    };
    sim.add_key(key.clone());
    let (spot, futures) = (sim.spot_url(), sim.futures_url());
    let run = tokio::task::spawn_blocking(move || {
        std::process::Command::new(python)
            .arg(root.join("tests/python/exchange_clients.py"))
            .args([spot, futures, serde_json::to_string(&key).unwrap()])
            .output()
            .unwrap()
    });
    let run = run.await.unwrap();
    let output = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success(),
        "{output}{}",
        String::from_utf8_lossy(&run.stderr)
    );
    assert!(output.ends_with("all steps done\n"), "{output}");
    let received = sim.received();
    for (host, has_partner) in [
        (Host::Spot, false),
        (Host::Spot, true),
        (Host::Futures, false),
        (Host::Futures, true),
    ] {
        // The SDK signs without a partner, ccxt with one.
        let verified = received.iter().filter(|request| {
            request.host == host
                && request.signature == Signature::Verified
                && request.method == "POST"
                && request.header("kc-api-partner").is_some() == has_partner
        });
        assert!(verified.count() > 0, "{host:?}, partner: {has_partner}");
    }
    let refused = |code| {
        received
            .iter()
            .any(|request| request.signature == Signature::Refused(code))
    };
    assert!(refused("400004") && !refused("400005"));
}
