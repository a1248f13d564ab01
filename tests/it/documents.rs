//! The documents describe every metric, reason, setting and audit event, and their links work.

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

/// The names in backticks in the first column of the tables below `heading`.
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
async fn every_metric_is_documented_and_every_documented_metric_exists() {
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
        let Some(declared) = line.strip_prefix("# TYPE ") else {
            continue;
        };
        let declared = declared.strip_prefix("credbroker_").unwrap_or(declared);
        let (name, _) = declared.split_once(' ').unwrap();
        exposed.insert(name.to_owned());
    }
    let documented: BTreeSet<_> = rows(OPERATIONS, "\n## Metrics\n")
        .into_iter()
        .map(ToOwned::to_owned)
        .collect();
    assert_eq!(exposed, documented);
    // Alarms use only metrics that exist.
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
    // The error about an unknown key lists the valid keys.
    for section in ["limits", "egress", "vault", "reload", "log", "audit"] {
        let wrong = format!("{CONFIG}\n").replace(
            &format!("[{section}]\n"),
            &format!("[{section}]\nno_such_key = 1\n"),
        );
        let problems = Config::parse(&wrong, folder).unwrap_err();
        let error = problems
            .iter()
            .map(ToString::to_string)
            .find(|error| error.contains("no_such_key"));
        let error = error.unwrap();
        let keys = error.split("its keys are: ").nth(1).unwrap();
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
fn bots_need_a_receive_limit_only_if_an_admin_raises_the_size_of_answers() {
    // `contract::largest_answer_reaches_a_client_with_default_settings` shows that the default is enough.
    assert!(CONFIG.contains("# max_answer_bytes = 4000000 "));
    let limits = ["max_receive_message_length", "max_decoding_message_size"];
    let (before, section) = BOTS.split_once("## Set the receive limit").unwrap();
    let python = include_str!("../../examples/bot.py");
    let rust = include_str!("../../examples/bot.rs");
    for limit in limits {
        assert!(section.contains(limit));
        for text in [before, python, rust] {
            assert!(!text.contains(limit), "{limit}");
        }
    }
}

/// Runs the command of a document that reads the journal; `None` without jq.
fn run_on_journal(document: &str, journal: &str) -> Option<String> {
    let mut lines = document.lines();
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
        not_run("recipe for the journal", "jq", "no jq on PATH");
        return None;
    }
    assert!(run.status.success(), "{:?}", run.stderr);
    Some(String::from_utf8(run.stdout).unwrap())
}

#[test]
fn jq_recipe_for_one_call_works_on_a_journal() {
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
    let Some(found) = run_on_journal(OPERATIONS, journal) else {
        return;
    };
    assert_eq!(found.lines().count(), 2, "{found}");
    assert!(!found.contains("other") && found.contains("OVERLOADED"));
}

#[test]
fn jq_recipe_finds_audit_lines_that_could_not_be_written() {
    let journal = concat!(
        "Started credbroker.service.\n",
        r#"{"message":"audit line not written; the broker stops","line":"{\"event\":\"outcome\",\"call\":7}"}"#,
        "\n",
        r#"{"message":"key loaded"}"#,
        "\n",
        "[\"not an object\"]\n",
    );
    let Some(found) = run_on_journal(AUDIT, journal) else {
        return;
    };
    assert_eq!(found, "{\"event\":\"outcome\",\"call\":7}\n");
}

/// Every command in docs/audit.md that reads an audit log.
fn recipes() -> impl Iterator<Item = &'static str> {
    AUDIT.lines().filter(|line| line.starts_with("jq "))
}

#[test]
fn jq_recipes_work_on_an_audit_log_with_torn_lines() {
    // Torn lines look as the broker completes them.
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
        // Torn: call number 25 was cut to 2, and call 2 has finished.
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
        r#"{"event":"intent","time_ms":10250,"run":"c","call":1,"request_id":"r6","bot":"c","account":"main","client_oids":["late"]}"#,
        "\n",
        r#"{"event":"outcome","time_ms":10500,"run":"c","call":1,"request_id":"r6","bot":"c","outcome":"maybe_sent"}"#,
        "\n",
        r#"{"event":"late_answer","time_ms":11000,"run":"c","call":1,"request_id":"r6","bot":"c","outcome":"accepted"}"#,
        "\n",
        r#"{"event":"intent","time_ms":12000,"run":"c","call":2,"request_id":"r7","principal":"p","account":"main"}"#,
        "\n",
        r#"{"event":"outcome","time_ms":12001,"run":"c","call":2,"request_id":"r7","principal":"p","outcome":"maybe_sent","rea":0,"torn":true}"#,
        "\n",
        r#"{"event":"intent","time_ms":5,"run":"a","ca"#,
    );
    assert_eq!(recipes().count(), 5);
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
        let (stdout, stderr) = (String::from_utf8(run.stdout).unwrap(), run.stderr);
        assert!(
            run.status.success(),
            "{recipe}: {}",
            String::from_utf8_lossy(&stderr)
        );
        let mut lines: Vec<&str> = stdout.lines().collect();
        let expected = if recipe.contains("late_answer") {
            concat!(
                "1970-01-01T00:00:10Z\tc\tmain\tlate\taccepted\n",
                "1970-01-01T00:00:12Z\tp\tmain\t\t\n"
            )
        } else if recipe.contains("group_by") {
            lines.sort_unstable();
            assert_eq!(
                lines,
                [
                    "\t\t\t",
                    "\t\t\t",
                    "1\tb\tmain\tlost",
                    "12000\tp\tmain\t",
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
        assert_eq!(stdout, expected, "{recipe}");
    }
}

/// The valid keys that the error about `no_such_key` lists.
fn valid_keys<T, P: ToString>(parsed: Result<T, Vec<P>>) -> BTreeSet<String> {
    let problems = parsed.err().unwrap();
    let problems = problems.iter().map(ToString::to_string);
    let mut matching = problems.filter(|problem| problem.contains("no_such_key: "));
    let error = matching.next().unwrap();
    let keys = error.split("its keys are: ").nth(1).unwrap();
    keys.split(", ").map(ToOwned::to_owned).collect()
}

fn parse(text: &str) -> Result<Config, Vec<impl fmt::Debug + fmt::Display + use<>>> {
    Config::parse(text, Path::new("/etc/credbroker"))
}

fn text_of(problems: &[impl ToString]) -> String {
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    problems.join("\n")
}

/// The configuration sections that have their own table in the document.
const SECTIONS: [&str; 10] = [
    "listen", "tls", "vault", "egress", "exchange", "limits", "reload", "audit", "orders", "log",
];

#[test]
fn every_setting_is_documented_and_every_documented_setting_exists() {
    let documented = |document, heading: &str| -> BTreeSet<String> {
        let rows = rows(document, heading).into_iter();
        rows.map(ToOwned::to_owned).collect()
    };
    let mut top = valid_keys(parse("no_such_key = 1"));
    top.retain(|key| !SECTIONS.contains(&key.as_str()));
    assert_eq!(top, documented(CONFIGURATION, "## Top level\n"));
    for section in SECTIONS {
        let mut actual = valid_keys(parse(&format!("[{section}]\nno_such_key = 1")));
        // `[vault.auth]` has its own table.
        actual.remove("auth");
        let heading = format!("## `[{section}]`\n");
        assert_eq!(actual, documented(CONFIGURATION, &heading), "{section}");
    }
    let methods = ["token_file", "approle", "kubernetes", "cert"].into_iter();
    let actual = methods.flat_map(|method| {
        let text = format!("[vault.auth]\nmethod = \"{method}\"\nno_such_key = 1");
        valid_keys(parse(&text))
    });
    let actual: BTreeSet<_> = actual.collect();
    assert_eq!(actual, documented(CONFIGURATION, "## `[vault.auth]`\n"));
    let admin = AdminFile::parse("no_such_key = 1", Path::new("/"));
    let actual = valid_keys(admin);
    assert_eq!(actual, documented(CONFIGURATION, "## `admin.toml`\n"));

    let account = valid_keys(Policy::parse("[account.a]\nno_such_key = 1"));
    let of_scopes = |key: &String| key.trim_end_matches(".<scope>").to_owned();
    let described = documented(RULES, "## Accounts\n");
    assert_eq!(account, described.iter().map(of_scopes).collect());
    let mut grant = valid_keys(Policy::parse("[[grant]]\nno_such_key = 1"));
    grant.extend(valid_keys(Policy::parse(
        "[[grant]]\nunlisted = true\nno_such_key = 1",
    )));
    assert_eq!(grant, documented(RULES, "## Grants\n"));
}

/// The cells of each row of the tables below a second-level heading.
fn cells<'d>(document: &'d str, heading: &str) -> Vec<Vec<&'d str>> {
    let part = document.split(heading).nth(1).unwrap();
    let part = part.split("\n## ").next().unwrap();
    let rows = part.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.trim_matches(['|', ' ']).split(" |"));
    cells.map(|cells| cells.map(str::trim).collect()).collect()
}

#[test]
fn documented_ranges_and_defaults_match_the_broker() {
    let smallest = CONFIGURATION.split("```toml\n").nth(1).unwrap();
    let smallest = smallest.split("```").next().unwrap();
    // Sorted, because the order of maps varies.
    let parsed = |text: &str| {
        let mut parsed = format!("{:?}", parse(text).unwrap()).into_bytes();
        parsed.sort_unstable();
        parsed
    };
    let short = parsed(smallest);
    let (mut ranges, mut defaults) = (0, 0);
    let mut check_range = |key: &str, range: &str, problems: &dyn Fn(&str) -> String| {
        let Some((least, most)) = range.split_once(" to ") else {
            return;
        };
        let (least, most): (u64, u64) = (least.parse().unwrap(), most.parse().unwrap());
        ranges += 1;
        let message = problems(&format!("{key} = {}", most + 1));
        let expected = format!("{key}: expected {least} to {most}, got {}", most + 1);
        assert!(
            message.contains(&expected),
            "{expected} is not in {message}"
        );
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
                assert!(parsed(&with_it) == short, "{section}.{key} = {default}");
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
fn every_audit_event_is_documented_and_every_documented_event_exists() {
    let code = [
        include_str!("../../src/audit.rs"),
        include_str!("../../src/audit/file.rs"),
        include_str!("../../src/audit/resolved.rs"),
    ];
    let code = code.map(|file| file.split("#[cfg(test)]").next().unwrap());
    let compact: String = code.concat().split_whitespace().collect();
    let named = [
        "event:\"",
        "self.write(\"",
        "self.result(\"",
        "self.line(seq,\"",
    ]
    .into_iter();
    let actual: BTreeSet<_> = named
        .flat_map(|start| compact.split(start).skip(1))
        .map(|rest| rest.split('"').next().unwrap())
        .collect();
    let headings = AUDIT.lines().filter_map(|line| line.strip_prefix("### `"));
    let documented: BTreeSet<_> = headings.map(|name| name.trim_end_matches('`')).collect();
    assert_eq!(actual, documented);
    for event in documented {
        let example = format!("\n{{\"v\":2,\"event\":\"{event}\",");
        assert!(AUDIT.contains(&example), "{event} has no example");
    }
}

#[test]
fn every_documented_stage_of_a_call_is_a_log_message() {
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

/// The Markdown documents, by their path in the repository.
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

/// The lines of a document outside its code blocks.
fn prose(document: &str) -> impl Iterator<Item = &str> {
    document.split("\n```").step_by(2).flat_map(str::lines)
}

/// The anchor that GitHub generates for a heading.
fn anchor(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    let kept: String = heading.trim().chars().filter(kept).collect();
    kept.to_lowercase().replace(' ', "-")
}

#[test]
fn links_between_documents_point_to_existing_files_and_headings() {
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
                let existing = root.join(&path).canonicalize();
                let existing = existing
                    .as_deref()
                    .ok()
                    .and_then(|path| path.strip_prefix(root).ok());
                let is_good = match (existing, fragment) {
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
fn table_rows_have_as_many_cells_as_their_header() {
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

/// Every module and function of `src` and `tests`, as `module::of::the::file::name`; unit tests are in `…::tests::`.
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
fn every_test_named_in_a_document_exists() {
    let existing = functions();
    let (mut named, mut missing) = (0, Vec::new());
    for (file, text) in [
        ("ARCHITECTURE.md", include_str!("../../ARCHITECTURE.md")),
        ("SECURITY.md", include_str!("../../SECURITY.md")),
    ] {
        // Only what looks like the path of a function or module of this project.
        let paths = text.split('`').skip(1).step_by(2).filter(|path| {
            path.contains("::")
                && path
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_:".contains(&b))
        });
        for path in paths {
            named += 1;
            let end = format!("::{path}");
            if !existing.iter().any(|function| function.ends_with(&end)) {
                missing.push(format!("{file} names {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "missing: {missing:#?}");
    assert!(named > 60, "{named}");
}

#[test]
fn every_mutant_patch_still_applies() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut patches = 0;
    for entry in std::fs::read_dir(root.join("tests/mutants")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_none_or(|extension| extension != "patch")
        {
            continue;
        }
        patches += 1;
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
    assert_eq!(patches, 9);
}
