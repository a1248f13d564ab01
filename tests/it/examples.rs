//! The example bots and the demo of the README work.

use std::path::Path;
use std::process::Output;

use credbroker_sim::installation::{MAIN_UID, RULES, Settings};
use credbroker_sim::kucoin::SimKey;
use tokio::task::spawn_blocking;

use crate::harness::{Lab, not_run};

/// The path of a program of `examples/`, or `None` if `cargo test` has not built it.
fn example(name: &str) -> Option<std::path::PathBuf> {
    let built = Path::new(env!("CARGO_BIN_EXE_credbroker"))
        .parent()
        .unwrap()
        .join("examples")
        .join(name);
    built.exists().then_some(built)
}

async fn run(program: impl AsRef<Path>, arguments: Vec<String>) -> Output {
    let mut command = std::process::Command::new(program.as_ref());
    command
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    // Not on this thread: the broker is running on it.
    spawn_blocking(move || command.output())
        .await
        .unwrap()
        .unwrap()
}

fn text(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// An installation whose folder contains the files that the example bots read.
async fn lab() -> Lab {
    let rules = RULES
        .replace("\"main\"\nscope", "\"alpha\"\nscope")
        .replace("[account.main]", "[account.alpha]");
    let keys = vec![("alpha", "main", MAIN_UID), ("other", "main", 1002)];
    let lab = Lab::with(Settings {
        rules,
        keys,
        ..Settings::default()
    })
    .await;
    let identity = lab.ca.bot("maker").unwrap();
    lab.write_identity("bot", &identity).unwrap();
    lab
}

fn check_bot(lab: &Lab, output: &str) {
    assert!(
        output.contains("/api/v1/accounts: HTTP 200, OUTCOME_ACCEPTED: {\"code\":\"200000\""),
        "{output}"
    );
    assert!(
        output.contains("/api/v1/hf/orders/test: HTTP 200, OUTCOME_ACCEPTED"),
        "{output}"
    );
    assert_eq!(lab.kucoin.received().len(), 2);
}

#[tokio::test]
async fn the_python_bot_trades() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/python");
    if !python.exists() {
        not_run(
            "Python bot",
            "python",
            "no .venv; run tests/python/setup.sh",
        );
        return;
    }
    let mut lab = lab().await;
    let folder = lab.folder.path().display().to_string();
    let output = run(
        python,
        vec!["examples/bot.py".to_owned(), lab.grpc.to_string(), folder],
    )
    .await;
    check_bot(&lab, &text(&output));
    lab.stop().await;
}

#[tokio::test]
async fn the_rust_bot_trades() {
    let Some(bot) = example("bot") else {
        not_run(
            "Rust bot",
            "examples",
            "not built; cargo test --workspace builds it",
        );
        return;
    };
    let mut lab = lab().await;
    let folder = lab.folder.path().display().to_string();
    check_bot(
        &lab,
        &text(&run(bot, vec![lab.grpc.to_string(), folder]).await),
    );
    lab.stop().await;
}

#[tokio::test]
async fn demo_prints_the_steps_of_the_readme() {
    let Some(demo) = example("demo") else {
        not_run(
            "demo",
            "examples",
            "not built; cargo test --workspace builds it",
        );
        return;
    };
    let output = text(&run(demo, vec!["--once".to_owned()]).await);
    for part in [
        "Vault and KuCoin are simulated",
        "broker, for admins         127.0.0.1:",
        "simulated KuCoin checked the signature: Verified",
        "reason POLICY_DENIED, outcome not_sent",
        "reason ANSWER_LOST, outcome maybe_sent",
        "Stopped. All files of the demo were removed.",
    ] {
        assert!(output.contains(part), "{part} is not in\n{output}");
    }
    assert_eq!(
        output.matches("signature: Verified").count(),
        10,
        "{output}"
    );
    assert!(!output.contains(&SimKey::fake(MAIN_UID).api_secret));
}
