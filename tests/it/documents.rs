//! The documents name what there is: every metric, reason, setting and audit event; and their links lead somewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use credbroker::cli::admin::AdminFile;
use credbroker::config::Config;
use credbroker::policy::Policy;
use credbroker::proto::{Method, Scope};

use crate::harness::{Lab, accounts, not_run, request, spot_order};

const AUDIT: &str = include_str!("../../docs/audit.md");
const BOTS: &str = include_str!("../../docs/bots.md");
const CONFIGURATION: &str = include_str!("../../docs/configuration.md");
const OPERATIONS: &str = include_str!("../../docs/operations.md");
const RULES: &str = include_str!("../../docs/rules.md");
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
    let mut lab = Lab::with(credbroker_sim::installation::Settings {
        process: true,
        ..credbroker_sim::installation::Settings::default()
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
    let mut exposed = BTreeSet::new();
    for line in text.lines() {
        let Some(declared) = line.strip_prefix("# TYPE credbroker_") else {
            continue;
        };
        let (name, _) = declared.split_once(' ').unwrap();
        exposed.insert(name.to_owned());
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
    let documented = rows(BOTS, "A failure of the broker is a gRPC status");
    let all = credbroker::base::outcome::Reason::ALL.map(credbroker::base::outcome::Reason::as_str);
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
        let problems = Config::parse(&wrong, folder).unwrap_err();
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

#[test]
fn examples_take_the_longest_answer_that_the_broker_sends() {
    // egress.max_answer_bytes by default, and what stands beside the body.
    assert!(CONFIG.contains("# max_answer_bytes = 16777216 "));
    let python = include_str!("../../examples/bot.py");
    let rust = include_str!("../../examples/bot.rs");
    let limit = "17 * 1024 * 1024";
    let option = format!("(\"grpc.max_receive_message_length\", {limit})");
    assert!(python.contains(&option) && BOTS.matches(&option).count() == 2);
    let constant = format!("MAX_ANSWER_BYTES: usize = {limit};");
    assert!(rust.contains(&constant) && BOTS.contains(&constant));
    assert!(rust.contains(".max_decoding_message_size(MAX_ANSWER_BYTES)"));
    let method = format!(".max_decoding_message_size({limit})");
    assert!(BOTS.contains(&method));
}

#[test]
fn the_recipe_for_one_call_reads_a_journal() {
    let journal = concat!(
        "Started credbroker.service.\n",
        r#"{"message":"call ended","span":{"request.id":"REQUEST-ID"}}"#,
        "\n",
        r#"{"message":"call ended","request.id":"REQUEST-ID","reason":"OVERLOADED"}"#,
        "\n",
        r#"{"message":"call ended","request.id":"other","span":{"bot.id":"b"}}"#,
        "\n",
        r#"{"message":"key loaded"}"#,
        "\n",
    );
    let mut lines = OPERATIONS.lines();
    let recipe = lines
        .find_map(|line| line.strip_prefix("journalctl -u credbroker -o cat | "))
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("journal");
    std::fs::write(&file, journal).unwrap();
    let run = std::process::Command::new("sh")
        .args(["-c", recipe])
        .stdin(std::fs::File::open(&file).unwrap())
        .output()
        .unwrap();
    if run.status.code() == Some(127) {
        not_run("recipe for one call", "jq", "no jq on PATH");
        return;
    }
    let found = String::from_utf8(run.stdout).unwrap();
    assert!(run.status.success(), "{:?}", run.stderr);
    assert_eq!(found.lines().count(), 2, "{found}");
    assert!(!found.contains("other") && found.contains("OVERLOADED"));
}

/// Every command of the documents that reads an audit log.
fn recipes() -> impl Iterator<Item = &'static str> {
    AUDIT.lines().filter(|line| line.starts_with("jq "))
}

#[test]
fn recipes_survive_a_torn_line() {
    // Torn lines are as the broker completes them.
    let audit = concat!(
        r#"{"event":"intent","time_ms":1,"run":"a","call":1,"request_id":"r1","bot":"b","account":"main","client_oids":["lost"]}"#,
        "\n",
        r#"{"event":"intent","time_ms":2,"run":"a","call":2,"request_id":"r2","bot":"b","account":"main","client_oids":["refused"]}"#,
        "\n",
        r#"{"event":"denied","time_ms":2,"run":"a","call":2,"request_id":"r2","bot":"b"}"#,
        "\n",
        r#"{"event":"intent","time_ms":3,"run":"a","call":3,"request_id":"r3","bot":"b","client_oids":["cu"],"torn":true}"#,
        "\n\0\0\0\n",
        r#"{"event":"act","time_ms":4,"run":"a","who":"vault","action":"freeze","account":"main","key_after":"51de…"}"#,
        "\n",
        // Call 25 was cut to 2, which has ended.
        r#"{"event":"intent","time_ms":5,"run":"a","call":2,"torn":true}"#,
        "\n",
        r#"{"event":"intent","time_ms":6,"run":"b","call":1,"request_id":"r4","bot":"b","account":"main","client_oids":["unsure"]}"#,
        "\n",
        r#"{"event":"outcome","time_ms":7,"run":"b","call":1,"request_id":"r4","bo":0,"torn":true}"#,
        "\n",
        r#"{"event":"intent","time_ms":8,"run":"b","call":2,"request_id":"r5","bot":"c","account":"main","client_oids":0,"torn":true}"#,
        "\n",
        r#"{"event":"int","torn":true}"#,
        "\n",
        r#"{"event":0,"torn":true}"#,
        "\n",
        r#"{"event":"outcome","time_ms":9,"run":"b","torn":true}"#,
        "\n",
        r#"{"event":"torn","time_ms":9,"run":"c","detail":"cut off"}"#,
        "\n",
        r#"{"event":"intent","time_ms":5,"run":"a","ca"#,
    );
    assert_eq!(recipes().count(), 4);
    assert!(recipes().all(|recipe| recipe.contains("fromjson?")));
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("audit.jsonl"), audit).unwrap();
    for recipe in recipes() {
        let mut shell = std::process::Command::new("sh");
        let run = shell
            .args(["-c", recipe])
            .current_dir(folder.path())
            .output();
        let run = run.unwrap();
        if run.status.code() == Some(127) {
            not_run("recipes with jq", "jq", "no jq on PATH");
            return;
        }
        let (said, complaint) = (String::from_utf8(run.stdout).unwrap(), run.stderr);
        assert!(
            run.status.success(),
            "{recipe}: {}",
            String::from_utf8_lossy(&complaint)
        );
        let mut lines: Vec<&str> = said.lines().collect();
        let expected = if recipe.contains("group_by") {
            lines.sort_unstable();
            assert_eq!(
                lines,
                [
                    "\t\t\t",
                    "\t\t\t",
                    "1\tb\tmain\tlost",
                    "3\tb\t\tcu",
                    "5\t\t\t",
                    "6\tb\tmain\tunsure",
                    "8\tc\tmain\t",
                ]
            );
            continue;
        } else if recipe.contains("IN(") {
            "[\"freeze\",\"main\",null,null,null]\n"
        } else {
            concat!(
                r#"{"event":"act","time_ms":4,"run":"a","who":"vault","action":"freeze","account":"main","key_after":"51de…"}"#,
                "\n"
            )
        };
        assert_eq!(said, expected, "{recipe}");
    }
}

/// The keys that a problem names beside `no_such_key`.
fn keys_beside<T, P: ToString>(parsed: Result<T, Vec<P>>) -> BTreeSet<String> {
    let problems = parsed.err().unwrap();
    let problems = problems.iter().map(ToString::to_string);
    let mut told = problems.filter(|problem| problem.contains("no_such_key: "));
    let told = told.next().unwrap();
    let keys = told.split("its keys are: ").nth(1).unwrap();
    keys.split(", ").map(ToOwned::to_owned).collect()
}

fn parse(text: &str) -> Result<Config, Vec<impl fmt::Debug + fmt::Display + use<>>> {
    Config::parse(text, Path::new("/etc/credbroker"))
}

fn text_of(problems: &[impl ToString]) -> String {
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    problems.join("\n")
}

/// The sections of a configuration whose settings are a table of their own in the document.
const SECTIONS: [&str; 9] = [
    "listen", "tls", "vault", "egress", "exchange", "limits", "reload", "audit", "log",
];

#[test]
fn every_setting_is_documented_and_every_documented_one_exists() {
    let documented = |document, heading: &str| -> BTreeSet<String> {
        let rows = rows(document, heading).into_iter();
        rows.map(ToOwned::to_owned).collect()
    };
    let mut top = keys_beside(parse("no_such_key = 1"));
    top.retain(|key| !SECTIONS.contains(&key.as_str()));
    assert_eq!(top, documented(CONFIGURATION, "## Top level\n"));
    for section in SECTIONS {
        let mut there = keys_beside(parse(&format!("[{section}]\nno_such_key = 1")));
        // A table of its own.
        there.remove("auth");
        let heading = format!("## `[{section}]`\n");
        assert_eq!(there, documented(CONFIGURATION, &heading), "{section}");
    }
    let methods = ["token_file", "approle", "kubernetes", "cert"].into_iter();
    let there = methods.flat_map(|method| {
        let text = format!("[vault.auth]\nmethod = \"{method}\"\nno_such_key = 1");
        keys_beside(parse(&text))
    });
    let there: BTreeSet<_> = there.collect();
    assert_eq!(there, documented(CONFIGURATION, "## `[vault.auth]`\n"));
    let admin = AdminFile::parse("no_such_key = 1", Path::new("/"));
    let there = keys_beside(admin);
    assert_eq!(there, documented(CONFIGURATION, "## `admin.toml`\n"));

    let account = keys_beside(Policy::parse("[account.a]\nno_such_key = 1"));
    let of_scopes = |key: &String| key.trim_end_matches(".<scope>").to_owned();
    let described = documented(RULES, "## Accounts\n");
    assert_eq!(account, described.iter().map(of_scopes).collect());
    let mut grant = keys_beside(Policy::parse("[[grant]]\nno_such_key = 1"));
    grant.extend(keys_beside(Policy::parse(
        "[[grant]]\nunlisted = true\nno_such_key = 1",
    )));
    assert_eq!(grant, documented(RULES, "## Grants\n"));
}

/// The cells of each row of the tables below a heading of the second level, without their backticks.
fn cells<'d>(document: &'d str, heading: &str) -> Vec<Vec<&'d str>> {
    let part = document.split(heading).nth(1).unwrap();
    let part = part.split("\n## ").next().unwrap();
    let rows = part.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.trim_matches(['|', ' ']).split(" |"));
    cells.map(|cells| cells.map(str::trim).collect()).collect()
}

#[test]
fn documented_ranges_and_defaults_are_those_of_the_broker() {
    let smallest = CONFIGURATION.split("```toml\n").nth(1).unwrap();
    let smallest = smallest.split("```").next().unwrap();
    // Without the order of maps.
    let meant = |text: &str| {
        let mut meant = format!("{:?}", parse(text).unwrap()).into_bytes();
        meant.sort_unstable();
        meant
    };
    let short = meant(smallest);
    let (mut ranges, mut defaults) = (0, 0);
    let mut check_range = |key: &str, range: &str, problems: &dyn Fn(&str) -> String| {
        let Some((least, most)) = range.split_once(" to ") else {
            return;
        };
        let (least, most): (u64, u64) = (least.parse().unwrap(), most.parse().unwrap());
        ranges += 1;
        let said = problems(&format!("{key} = {}", most + 1));
        let expected = format!("{key}: expected {least} to {most}, got {}", most + 1);
        assert!(said.contains(&expected), "{expected} is not in {said}");
    };
    for section in SECTIONS {
        let header = format!("[{section}]\n");
        for row in cells(CONFIGURATION, &format!("## `[{section}]`\n")) {
            let (key, default) = (row[0].trim_matches('`'), row[3]);
            let range = row.get(4).copied().unwrap_or_default();
            check_range(key, range, &|line| {
                let problems = parse(&format!("{header}{line}")).unwrap_err();
                text_of(&problems)
            });
            let default = default.trim_matches('`');
            let is_value = default.starts_with(['"', '[']) || default.parse::<u64>().is_ok();
            if is_value || default == "false" {
                defaults += 1;
                let with_it = if smallest.contains(&header) {
                    smallest.replace(&header, &format!("{header}{key} = {default}\n"))
                } else {
                    format!("{smallest}\n{header}{key} = {default}\n")
                };
                assert!(meant(&with_it) == short, "{section}.{key} = {default}");
            }
        }
    }
    for row in cells(RULES, "## Accounts\n") {
        let key = row[0].trim_matches('`');
        check_range(key, row[3], &|line| {
            let problems = Policy::parse(&format!("[account.a]\n{line}")).unwrap_err();
            text_of(&problems)
        });
    }
    assert!(ranges >= 27 && defaults >= 34, "{ranges}, {defaults}");
}

#[test]
fn every_audit_event_is_documented_and_every_documented_one_exists() {
    let code = include_str!("../../src/audit.rs");
    let code = code.split("#[cfg(test)]").next().unwrap();
    let compact: String = code.split_whitespace().collect();
    let named = ["event:\"", "self.write(\""].into_iter();
    let there: BTreeSet<_> = named
        .flat_map(|start| compact.split(start).skip(1))
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    let headings = AUDIT.lines().filter_map(|line| line.strip_prefix("### `"));
    let documented: BTreeSet<_> = headings.map(|name| name.trim_end_matches('`')).collect();
    assert_eq!(there, documented);
    for event in documented {
        let example = format!("\n{{\"v\":1,\"event\":\"{event}\",");
        assert!(AUDIT.contains(&example), "{event} has no example");
    }
}

#[test]
fn every_stage_of_a_call_is_a_message_of_the_broker() {
    let call = include_str!("../../src/broker/call.rs");
    let stages = rows(OPERATIONS, "## Follow one call\n");
    assert_eq!(stages.len(), 8);
    for stage in stages {
        assert!(call.contains(&format!("\"{stage}\"")), "{stage}");
    }
}

#[test]
fn readme_is_short() {
    let readme = include_str!("../../README.md");
    assert!(readme.len() <= 8192, "{} bytes", readme.len());
}

/// The documents that readers get, by their path in the repository.
fn documents() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut documents = BTreeMap::new();
    for folder in ["", "docs", "deploy", "deploy/vault"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let name = path.strip_prefix(root).unwrap().to_owned();
                documents.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    documents
}

/// The lines of a document outside its blocks.
fn prose(document: &str) -> impl Iterator<Item = &str> {
    document.split("\n```").step_by(2).flat_map(str::lines)
}

/// What GitHub makes of a heading in an address.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let kept: String = heading.trim().chars().filter(kept).collect();
    kept.to_lowercase().replace(' ', "-")
}

#[test]
fn links_between_documents_lead_to_files_and_headings_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let documents = documents();
    let anchors = |document: &str| -> BTreeSet<String> {
        let headings = prose(document).filter(|line| line.starts_with('#'));
        headings
            .map(|line| anchor(line.trim_start_matches('#')))
            .collect()
    };
    let (mut links, mut broken) = (0, Vec::new());
    for (name, text) in &documents {
        for line in prose(text) {
            for rest in line.split("](").skip(1) {
                let target = rest.split(')').next().unwrap();
                if target.starts_with("http") {
                    continue;
                }
                links += 1;
                let (file, fragment) = target.split_once('#').unwrap_or((target, ""));
                let path = if file.is_empty() {
                    name.clone()
                } else {
                    name.parent().unwrap().join(file)
                };
                let there = root.join(&path).canonicalize();
                let there = there
                    .as_deref()
                    .ok()
                    .and_then(|path| path.strip_prefix(root).ok());
                let is_good = match (there, fragment) {
                    (None, _) => false,
                    (Some(_), "") => true,
                    (Some(path), fragment) => documents
                        .get(path)
                        .is_some_and(|document| anchors(document).contains(fragment)),
                };
                if !is_good {
                    broken.push(format!("{}: {target}", name.display()));
                }
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(links > 80, "{links}");
}

#[test]
fn rows_of_tables_have_the_cells_of_their_header() {
    for (name, text) in documents() {
        let mut columns = None;
        for line in prose(&text) {
            let cells = line.replace("\\|", "").matches('|').count();
            if !line.starts_with('|') {
                columns = None;
            } else if *columns.get_or_insert(cells) != cells {
                panic!("{}: {line}", name.display());
            }
        }
    }
}

/// Every function of the sources and of these tests, as `module::of::the::file::name`; a unit test is below `tests`.
fn functions() -> BTreeSet<String> {
    fn visit(folder: &std::path::Path, module: &str, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_string_lossy();
            let mut module = format!("{module}::{name}");
            if path.is_dir() {
                visit(&path, &module, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.insert(module.clone());
                for line in std::fs::read_to_string(&path).unwrap().lines() {
                    if line.ends_with("mod tests {") {
                        module += "::tests";
                        found.insert(module.clone());
                    }
                    let after = line.split_once("fn ").map(|(_, after)| after);
                    if let Some((name, _)) = after.and_then(|after| after.split_once(['(', '<'])) {
                        found.insert(format!("{module}::{name}"));
                    }
                }
            }
        }
    }
    let mut found = BTreeSet::new();
    for folder in ["src", "tests"] {
        visit(
            &std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder),
            "",
            &mut found,
        );
    }
    found
}

#[test]
fn every_test_that_a_document_names_is_there() {
    let there = functions();
    let (mut named, mut missing) = (0, Vec::new());
    for (file, text) in [
        ("ARCHITECTURE.md", include_str!("../../ARCHITECTURE.md")),
        ("SECURITY.md", include_str!("../../SECURITY.md")),
    ] {
        // Only what is written like a path of a function or module, and of no library.
        let paths = text.split('`').skip(1).step_by(2).filter(|path| {
            path.contains("::")
                && path
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_:".contains(&b))
        });
        for path in paths {
            named += 1;
            let end = format!("::{path}");
            if !there.iter().any(|function| function.ends_with(&end)) {
                missing.push(format!("{file} names {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "not there: {missing:#?}");
    assert!(named > 60, "{named}");
}

#[test]
fn every_planted_fault_still_fits_the_code() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut faults = 0;
    for entry in std::fs::read_dir(root.join("tests/mutants")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "patch")
        {
            continue;
        }
        faults += 1;
        let fault = std::fs::read_to_string(&path).unwrap();
        let file = fault.split_once("\n--- a/").unwrap().1.lines().next();
        let code = std::fs::read_to_string(root.join(file.unwrap())).unwrap();
        for hunk in fault.split("\n@@ ").skip(1) {
            let before: String = hunk
                .lines()
                .skip(1)
                .filter_map(|line| line.strip_prefix(['-', ' ']))
                .map(|line| line.to_owned() + "\n")
                .collect();
            assert!(code.contains(&before), "{}: {before}", path.display());
        }
    }
    assert_eq!(faults, 3);
}

/// Wording that a reader has to translate, and names that lie. `CONTRIBUTING.md` says how to write instead.
const BANNED: [&str; 28] = [
    "a run before this one",
    "adding risk",
    "adds risk",
    "add_risk",
    "door",
    "doors",
    "doubts",
    "ended early",
    "heed",
    "is begun",
    "is_calm",
    "is_own",
    "is_to_be_judged",
    "learnt",
    "look_again",
    "look_now",
    "no time at all",
    "nobody's",
    "on record",
    "put_to_use",
    "same command again",
    "serves on",
    "shall",
    "stranger",
    "strangers",
    "untold",
    "withdraw_",
    "withdrawn",
];

/// Parts of lines that may hold one of them.
const ALLOWED: [(&str, &str); 1] = [("shall", "No \"shall\"")];

#[test]
fn code_and_documents_hold_no_banned_phrase() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut folders: Vec<_> = ["docs", "proto", "src"].map(|name| root.join(name)).into();
    let mut files: Vec<_> = [
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "README.md",
        "SECURITY.md",
    ]
    .map(|name| root.join(name))
    .into();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path
                .extension()
                .is_some_and(|kind| ["md", "proto", "rs"].contains(&kind.to_str().unwrap()))
            {
                files.push(path);
            }
        }
    }
    let mut found = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(&path).unwrap();
        for (number, line) in (1..).zip(text.lines()) {
            let words = format!(" {} ", line.to_lowercase());
            for phrase in BANNED {
                // Whole words: `shall` is not in `marshall`.
                let starts = |at: usize| !words[..at].ends_with(|c: char| c.is_alphanumeric());
                let ends = |at: usize| {
                    phrase.ends_with('_')
                        || !words[at + phrase.len()..].starts_with(char::is_alphanumeric)
                };
                let is_there = words
                    .match_indices(phrase)
                    .any(|(at, _)| starts(at) && ends(at));
                let is_allowed = ALLOWED
                    .iter()
                    .any(|(allowed, beside)| *allowed == phrase && line.contains(beside));
                if is_there && !is_allowed {
                    found.push(format!(
                        "{}:{number}: {phrase:?}",
                        path.strip_prefix(root).unwrap().display()
                    ));
                }
            }
        }
    }
    assert_eq!(found, [""; 0], "write it in plain words: CONTRIBUTING.md");
}
