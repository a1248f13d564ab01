//! The documents name what there is: every metric, every reason, every setting.

use std::collections::BTreeSet;

use credbroker::api::proto::{Method, Scope};

use crate::harness::{Lab, accounts, request, spot_order};

const OPERATIONS: &str = include_str!("../../docs/operations.md");
const README: &str = include_str!("../../README.md");
const CONFIG: &str = include_str!("../../deploy/config.toml");

/// Names in backticks at the beginning of the rows of a table, below the line that holds `heading`.
fn rows<'d>(document: &'d str, heading: &str) -> BTreeSet<&'d str> {
    let table = document.split(heading).nth(1).unwrap();
    let table = table.split("\n## ").next().unwrap();
    let cells = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| line.split(" |").next());
    cells
        .flat_map(|cell| cell.split(", "))
        .map(|name| name.trim_matches('`'))
        .collect()
}

#[tokio::test]
async fn every_metric_is_documented_and_every_documented_one_exists() {
    let mut lab = Lab::with(crate::harness::Settings {
        process: true,
        ..crate::harness::Settings::default()
    })
    .await;
    let mut bot = lab.bot("maker").await;
    bot.send(spot_order("documented")).await.unwrap();
    bot.send(accounts()).await.unwrap();
    let denied = request(
        Scope::SpotMargin,
        Method::Get,
        "/api/v3/withdrawals/quotas",
        "",
    );
    bot.send(denied).await.unwrap_err();
    let (_, text) = lab.get("/metrics").await;
    assert!(text.ends_with("# EOF\n"), "{text}");
    let mut exposed = BTreeSet::new();
    for line in text.lines() {
        let Some(declared) = line.strip_prefix("# TYPE credbroker_") else {
            continue;
        };
        let (name, kind) = declared.split_once(' ').unwrap();
        let suffix = if kind == "counter" { "_total" } else { "" };
        exposed.insert(format!("{name}{suffix}"));
    }
    let documented: BTreeSet<_> = rows(OPERATIONS, "\n## Metrics\n")
        .into_iter()
        .map(ToOwned::to_owned)
        .collect();
    assert_eq!(exposed, documented);
    // Alarms speak of metrics that exist.
    for part in OPERATIONS.split("credbroker_").skip(1) {
        let end = part.find(|c: char| !(c.is_ascii_lowercase() || c == '_'));
        let name = &part[..end.unwrap_or(part.len())];
        assert!(documented.contains(name) || name.is_empty(), "{name}");
    }
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[test]
fn every_reason_is_in_the_error_reference() {
    let documented = rows(README, "A failure of the broker is a gRPC status");
    let all = credbroker::outcome::Reason::ALL.map(credbroker::outcome::Reason::as_str);
    assert_eq!(documented, BTreeSet::from(all));
}

#[test]
fn the_example_configuration_shows_every_setting() {
    let folder = std::path::Path::new("/etc/credbroker");
    // The problem of a wrong key names those that there are.
    for section in ["limits", "egress", "vault", "reload", "log", "audit"] {
        let wrong = format!("{CONFIG}\n").replace(
            &format!("[{section}]\n"),
            &format!("[{section}]\nno_such_key = 1\n"),
        );
        let problems = credbroker::config::Config::parse(&wrong, folder).unwrap_err();
        let told = problems
            .iter()
            .map(ToString::to_string)
            .find(|told| told.contains("no_such_key"));
        let told = told.unwrap();
        let keys = told.split("its keys are: ").nth(1).unwrap();
        for key in keys.split(", ") {
            let shown = |line: &str| {
                let line = line.trim_start_matches(['#', ' ']);
                line.starts_with(&format!("{key} "))
                    || line.starts_with(&format!("[{section}.{key}]"))
            };
            assert!(CONFIG.lines().any(shown), "[{section}] {key} is not shown");
        }
    }
}
