//! The files of `deploy/`: the examples load without changes and show the defaults, and generated files are up to date.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use credbroker::cli::admin::AdminFile;
use credbroker::config::Config;
use credbroker::policy::Policy;
use credbroker_sim::pki::{Ca, Usage};
use serde_json::Value;

use crate::harness::not_run;

const CONFIG: &str = include_str!("../../deploy/config.toml");
const ADMIN: &str = include_str!("../../deploy/admin.toml");
const RULES: &str = include_str!("../../deploy/rules.toml");

#[test]
fn the_example_configuration_loads() {
    Config::parse(CONFIG, Path::new("/etc/credbroker")).unwrap();
}

#[test]
fn example_admin_toml_loads_and_matches_the_example_configuration() {
    let folder = Path::new("/etc/credbroker");
    let admin = AdminFile::parse(ADMIN, folder).unwrap();
    let config = Config::parse(CONFIG, folder).unwrap();
    assert_eq!(admin.broker, config.admin.unwrap().to_string());
    let vault = admin.vault.unwrap();
    assert_eq!(
        (vault.settings.mount, vault.settings.prefix),
        (config.vault.mount, config.vault.prefix)
    );
    let long = uncommented(ADMIN, &["namespace"]);
    assert_ne!(long, ADMIN);
    let (short, long) = (
        AdminFile::parse(ADMIN, folder),
        AdminFile::parse(&long, folder),
    );
    assert_eq!(
        format!("{:?}", short.unwrap()),
        format!("{:?}", long.unwrap())
    );
}

#[test]
fn the_example_rules_load() {
    let policy = Policy::parse(RULES).unwrap();
    assert_eq!(policy.accounts().count(), 2);
}

/// Settings that are commented out because the example uses an alternative.
const ALTERNATIVES: [&str; 8] = [
    "method = \"approle\"",
    "mount = \"approle\"",
    "role_id",
    "secret_id_file",
    "namespace",
    "send_signed",
    "spot =",
    "futures =",
];

/// The text with its commented-out settings enabled, except those that start with one of `except`.
fn uncommented(text: &str, except: &[&str]) -> String {
    let is_key = |key: &str| {
        key.split_once(" = ")
            .is_some_and(|(name, _)| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
    };
    let lines = text.lines().map(|line| match line.strip_prefix("# ") {
        Some(key) if is_key(key) && !except.iter().any(|other| key.starts_with(other)) => key,
        _ => line,
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn commented_out_settings_show_the_defaults() {
    let uncommented = uncommented(CONFIG, &ALTERNATIVES);
    let folder = Path::new("/etc/credbroker");
    let (short, long) = (
        Config::parse(CONFIG, folder).unwrap(),
        Config::parse(&uncommented, folder).unwrap(),
    );
    assert_ne!(CONFIG, uncommented);
    assert_eq!(format!("{short:?}").len(), format!("{long:?}").len());
    assert_eq!(short.request_limits, long.request_limits);
    assert_eq!(short.vault_poll, long.vault_poll);
    assert_eq!(format!("{:?}", short.egress), format!("{:?}", long.egress));
    assert_eq!(format!("{:?}", short.vault), format!("{:?}", long.vault));
    assert_eq!(
        (short.default_deadline, short.drain_timeout),
        (long.default_deadline, long.drain_timeout)
    );
    assert_eq!(short.audit_file, long.audit_file);
}

#[test]
fn check_config_reports_problems_of_all_files_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write(
        "config.toml",
        &CONFIG
            .replace("/etc/credbroker/", "")
            .replace("/var/lib/credbroker", "state"),
    );
    write(
        "rules.toml",
        &RULES
            .replace("vip = 3", "vip = 99")
            .replace("\"trade\"]", "\"withdraw\"]"),
    );
    let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
    let output = command
        .args(["check-config", "--config"])
        .arg(folder.path().join("config.toml"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8(output.stderr).unwrap();
    for part in [
        "account.main.vip: expected 0 to 12, got 99",
        "grant[0].allow[2]: \"withdraw\" cannot be granted as a class",
        "tls.certificate: expected PEM certificates",
        "tls.key: expected a PEM private key",
        "tls.client_ca: expected PEM certificates",
        "5 problems",
    ] {
        assert!(stderr.contains(part), "{part} is not in\n{stderr}");
    }
}

#[test]
fn check_config_rejects_a_server_certificate_that_no_bot_would_accept() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let ca = Ca::new("throw-away CA of a test").unwrap();
    let (server, bot) = (ca.server().unwrap(), ca.bot("maker").unwrap());
    let nameless = ca.issue("credbroker", &[], Usage::Server).unwrap();
    write(
        "config.toml",
        &CONFIG
            .replace("/etc/credbroker/tls/", "")
            .replace("/etc/credbroker/", ""),
    );
    write("rules.toml", RULES);
    write("bots-ca.pem", ca.certificate_pem());
    let check = |certificate: &str, key: &str| {
        write("server.pem", certificate);
        write("server.key", key);
        let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
        let config = folder.path().join("config.toml");
        let output = command
            .args(["check-config", "--config"])
            .arg(config)
            .output()
            .unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    let cases = [
        (
            &server.certificate_pem,
            &server.key_pem,
            "no problems; 2 accounts",
        ),
        (&server.certificate_pem, &bot.key_pem, "tls.key: "),
        (
            &bot.certificate_pem,
            &bot.key_pem,
            "tls.certificate: is not a server certificate",
        ),
        (
            &nameless.certificate_pem,
            &nameless.key_pem,
            "tls.certificate: has no DNS name or IP address",
        ),
    ];
    for (certificate, key, part) in cases {
        let stderr = check(certificate, key);
        assert!(stderr.contains(part), "{part} is not in {stderr}");
    }
}

/// If this variable is set, the test writes completions and man pages instead of comparing them.
const WRITE: &str = "CREDBROKER_WRITE_DEPLOY";

/// Files by name.
type Files = BTreeMap<String, String>;

fn completions() -> Files {
    let script = |shell: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_credbroker"));
        let output = command.args(["completions", shell]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let shells = [
        ("bash", "credbroker.bash"),
        ("fish", "credbroker.fish"),
        ("zsh", "_credbroker"),
    ];
    shells
        .map(|(shell, file)| (file.to_owned(), script(shell)))
        .into()
}

fn man_pages() -> Files {
    let mut command = credbroker::cli::command().disable_help_subcommand(true);
    command.build();
    let mut pages = Files::new();
    add_pages(&mut pages, &command);
    pages
}

/// Adds a page for this command and for each of its subcommands.
fn add_pages(pages: &mut Files, command: &clap::Command) {
    let source = concat!("credbroker ", env!("CARGO_PKG_VERSION"));
    let man = clap_mangen::Man::new(command.clone()).source(source);
    let mut page = Vec::new();
    man.render(&mut page).unwrap();
    pages.insert(man.get_filename(), String::from_utf8(page).unwrap());
    for command in command.get_subcommands() {
        add_pages(pages, command);
    }
}

fn files(folder: &Path) -> Files {
    let entries = fs::read_dir(folder).into_iter().flatten();
    entries
        .map(|entry| {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read_to_string(entry.path()).unwrap())
        })
        .collect()
}

#[test]
fn generated_files_are_up_to_date() {
    let generated = [
        ("deploy/completions", completions()),
        ("deploy/man", man_pages()),
        ("deploy/prometheus", prometheus_rules()),
    ];
    for (folder, generated) in generated {
        let folder = Path::new(folder);
        if std::env::var_os(WRITE).is_some() {
            let _ = fs::remove_dir_all(folder);
            fs::create_dir_all(folder).unwrap();
            for (name, text) in &generated {
                fs::write(folder.join(name), text).unwrap();
            }
        }
        let committed = files(folder);
        let names = generated.keys().chain(committed.keys());
        let differs = |name: &&String| generated.get(*name) != committed.get(*name);
        let differing: BTreeSet<_> = names.filter(differs).collect();
        assert!(
            differing.is_empty(),
            "`{WRITE}=1 cargo test --locked --test it -- deploy::` writes these files of {} again: {differing:?}",
            folder.display()
        );
    }
}

/// Alerting rules for Prometheus: the alarms of docs/operations.md.
fn prometheus_rules() -> BTreeMap<String, String> {
    let mut rules = "# Generated from the table of alarms in docs/operations.md. `promtool check rules` accepts it.\n\
                     groups:\n  - name: credbroker\n    rules:\n"
        .to_owned();
    for alarm in alarms() {
        let camel = alarm.name.split(' ').map(|word| {
            let (first, rest) = word.split_at(1);
            first.to_uppercase() + rest
        });
        let name: String = camel.collect();
        let quoted = |text: &str| serde_json::to_string(text).unwrap();
        let _ = write!(
            rules,
            "      - alert: Credbroker{name}\n        expr: {}\n        for: {}\n        labels:\n          severity: {}\n        annotations:\n          summary: {}\n          description: {}\n",
            quoted(&alarm.expression),
            alarm.held_for,
            if alarm.is_urgent { "page" } else { "ticket" },
            quoted(&alarm.name),
            quoted(&alarm.cause),
        );
    }
    BTreeMap::from([("credbroker.rules.yml".to_owned(), rules)])
}

/// A row of the table of alarms.
struct Alarm {
    name: String,
    is_urgent: bool,
    expression: String,
    /// How long it must hold.
    held_for: String,
    cause: String,
}

/// The alarms with an expression; others watch the log.
fn alarms() -> Vec<Alarm> {
    let operations = include_str!("../../docs/operations.md");
    let (_, table) = operations.split_once("## Alarms\n").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    let rows = rows.filter_map(|row| {
        let row = row.replace("\\|", "\u{1}");
        let cells = row.split('|').map(|cell| cell.trim().replace('\u{1}', "|"));
        let cells: Vec<_> = cells.collect();
        let [_, name, when, cause, ..] = &cells[..] else {
            panic!("no alarm: {row}");
        };
        let (expression, held_for) = condition(when)?;
        Some(Alarm {
            name: name.trim_matches('*').to_owned(),
            is_urgent: name.starts_with("**"),
            expression,
            held_for,
            cause: without_links(&cause.replace('`', "")),
        })
    });
    rows.collect()
}

/// An expression such as `` `up == 0` or `absent(up)` for 1 min ``; `None` for a log line.
fn condition(text: &str) -> Option<(String, String)> {
    if text.starts_with("log line") {
        return None;
    }
    let parts: Vec<_> = text.split('`').collect();
    let expressions: Vec<_> = parts.iter().skip(1).step_by(2).copied().collect();
    let between: Vec<_> = parts.iter().step_by(2).map(|part| part.trim()).collect();
    let (last, between) = between.split_last().unwrap();
    let is_or = |words: &&str| ["or", ", or"].contains(words);
    assert!(between.iter().skip(1).all(is_or), "{text}");
    let held_for = match *last {
        "" => "0s".to_owned(),
        words => {
            let time = words.strip_prefix("for ").unwrap();
            time.replace(" min", "m").replace(' ', "")
        }
    };
    Some((expressions.join(" or "), held_for))
}

/// `[text](target)` becomes `text`.
fn without_links(text: &str) -> String {
    let mut parts = text.split('[');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (shown, rest) = part.split_once("](").unwrap_or((part, ""));
        plain += shown;
        plain += rest.split_once(')').map_or("", |(_, rest)| rest);
    }
    plain
}

#[test]
fn each_alarm_fires_and_ends() {
    let tests = include_str!("../prometheus/alarms.test.yml");
    let promtool = concat!(env!("CARGO_MANIFEST_DIR"), "/target/promtool");
    let rules = &prometheus_rules()["credbroker.rules.yml"];
    for line in rules.lines() {
        if let Some((_, name)) = line.split_once("alert: ") {
            let name = format!("alertname=\"{name}\"");
            assert!(
                tests.contains(&name),
                "no test of {name} in tests/prometheus"
            );
        }
    }
    for words in [
        ["check", "rules", "deploy/prometheus/credbroker.rules.yml"],
        ["test", "rules", "tests/prometheus/alarms.test.yml"],
    ] {
        let Ok(output) = Command::new(promtool).args(words).output() else {
            let reason = "no target/promtool; run tests/deploy/setup.sh";
            return not_run("each_alarm_fires_and_ends", "promtool", reason);
        };
        let text = String::from_utf8_lossy(&output.stdout);
        // The exit code of `check rules` is 0 even if it finds duplicates.
        assert!(
            output.status.success() && text.contains("SUCCESS"),
            "{text}"
        );
    }
}

/// Every expression of a JSON document: the members named `expr`.
fn expressions<'v>(value: &'v Value, found: &mut Vec<&'v str>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| expressions(value, found)),
        Value::Object(members) => {
            for (name, value) in members {
                match value.as_str() {
                    Some(text) if name == "expr" => found.push(text),
                    _ => expressions(value, found),
                }
            }
        }
        _ => {}
    }
}

#[test]
fn dashboard_uses_metrics_that_exist_in_valid_expressions() {
    let dashboard = include_str!("../../deploy/grafana/credbroker.json");
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    let mut found = Vec::new();
    expressions(&dashboard, &mut found);
    assert!(found.len() > 25);
    // `documents` compares this table with a running broker.
    let operations = include_str!("../../docs/operations.md");
    for name in found
        .iter()
        .flat_map(|text| text.split("credbroker_").skip(1))
    {
        let end = name.find(|c: char| !(c.is_ascii_lowercase() || c == '_'));
        let name = name[..end.unwrap_or(name.len())].trim_end_matches("_bucket");
        assert!(
            operations.contains(&format!("`{name}`")),
            "no metric {name}"
        );
    }
    let mut ids = BTreeSet::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
    }
    let mut rules = "groups:\n  - name: dashboard\n    rules:\n".to_owned();
    for (number, text) in found.iter().enumerate() {
        let text = text
            .replace("$__rate_interval", "5m")
            .replace("$__interval", "5m");
        let text = serde_json::to_string(&text).unwrap();
        let _ = write!(
            rules,
            "      - record: panel:{number}\n        expr: {text}\n"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dashboard.yml");
    fs::write(&file, rules).unwrap();
    let promtool = concat!(env!("CARGO_MANIFEST_DIR"), "/target/promtool");
    let Ok(output) = Command::new(promtool)
        .args(["check", "rules"])
        .arg(&file)
        .output()
    else {
        let name = "dashboard_uses_metrics_that_exist_in_valid_expressions";
        return not_run(
            name,
            "promtool",
            "no target/promtool; run tests/deploy/setup.sh",
        );
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("SUCCESS"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
