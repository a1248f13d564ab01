//! Checks every code block of README.md and docs/: commands run against the demo and an installation on the simulators,
//! which the documents themselves start; configurations, rules and JSON are parsed, and programs are compiled.
//!
//! A comment directly above a block describes what a reader does by hand, or why the block is not run: see [`NOTES`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use credbroker::cli::admin::AdminFile;
use credbroker::config::Config;
use credbroker::policy::Policy;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{not_run, print_always};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// In reading order: each document may use what the earlier ones have started.
const DOCUMENTS: [&str; 13] = [
    "README.md",
    "docs/bots.md",
    "docs/certificates.md",
    "docs/deployment.md",
    "docs/simulators.md",
    "docs/rules.md",
    "docs/configuration.md",
    "docs/operations.md",
    "docs/keys.md",
    "docs/audit.md",
    "docs/situations.md",
    "docs/architecture-quiz.md",
    "docs/chaos-result.md",
];

/// The notes that a comment above a block can contain.
const NOTES: [&str; 9] = [
    // The block is not run; the value is the reason.
    "not run",
    // The command keeps running until the test ends; the next block waits until it has printed the value.
    "background until",
    // The expected exit code if it is not 0, and after a comma the reason.
    "exit code",
    // A command to run before the block.
    "setup",
    // Lines for the standard input.
    "stdin",
    // A program that the block needs, by its name in `CREDBROKER_REQUIRE`.
    "needs",
    // The reader saves the block under this name.
    "file",
    // The block is the program in this file with different imports.
    "same as",
    // The demo prints these lines; only the part of a line before "…" is compared.
    "output of the demo",
];

/// The longest that a block may run: more than the 90 s that a halt may take.
const BLOCK_WITHIN: Duration = Duration::from_secs(120);

/// A block between fences.
struct Block {
    document: &'static str,
    line: usize,
    language: String,
    notes: BTreeMap<String, String>,
    text: String,
}

impl Block {
    fn note(&self, name: &str) -> Option<&str> {
        self.notes.get(name).map(String::as_str)
    }

    fn location(&self) -> String {
        format!("{}:{}", self.document, self.line)
    }
}

/// How a block was checked.
enum Done {
    Run,
    Parsed,
    Compiled,
    NotRun(String),
    /// A diagram, or output that is not compared.
    Text,
}

fn blocks_of(document: &'static str) -> Vec<Block> {
    let text = fs::read_to_string(Path::new(ROOT).join(document)).unwrap();
    let (mut blocks, mut notes) = (Vec::new(), BTreeMap::new());
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(note) = line.strip_prefix("<!-- ") {
            let note = note.strip_suffix(" -->").unwrap();
            let (name, value) = note.split_once(": ").unwrap_or((note, ""));
            assert!(NOTES.contains(&name), "{document}:{}: {note}", number + 1);
            notes.insert(name.to_owned(), value.to_owned());
        } else if let Some(language) = line.strip_prefix("```") {
            let mut text = String::new();
            for (_, line) in lines.by_ref().take_while(|(_, line)| *line != "```") {
                text.push_str(line);
                text.push('\n');
            }
            blocks.push(Block {
                document,
                line: number + 1,
                language: language.to_owned(),
                notes: std::mem::take(&mut notes),
                text,
            });
        } else {
            assert!(notes.is_empty(), "{document}:{}: {notes:?}", number + 1);
        }
    }
    blocks
}

/// A command that runs until the test ends.
struct Background {
    child: Child,
    output: PathBuf,
}

impl Drop for Background {
    fn drop(&mut self) {
        // Its process group: the shell and the processes that it has started.
        let group = format!("-{}", self.child.id());
        let mut kill = Command::new("kill");
        let _ = kill
            .args(["-TERM", "--", &group])
            .stderr(Stdio::null())
            .status();
        let _ = self.child.wait();
    }
}

/// The reader of the documents: a scratch folder and the processes started in it.
struct Reader {
    // Dropped first: the processes use the folder.
    background: Vec<Background>,
    folder: PathBuf,
    /// Addresses and folders in the documents, and what to replace them with.
    replacements: Vec<(String, String)>,
    /// The last complete configuration, with which partial ones are merged.
    config: String,
    scratch: TempDir,
}

impl Reader {
    /// A folder like a clone of the repository, and scripts that replace commands such as `cargo` and `sudo`.
    fn new(built: &Path) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let (folder, bin) = (scratch.path().join("clone"), scratch.path().join("bin"));
        for made in [&folder, &bin] {
            fs::create_dir(made).unwrap();
        }
        for name in ["examples", "proto", "tests", "deploy", ".venv"] {
            std::os::unix::fs::symlink(Path::new(ROOT).join(name), folder.join(name)).unwrap();
        }
        let mut replacements = vec![
            ("/etc/credbroker".to_owned(), folder.display().to_string()),
            (
                "/var/lib/credbroker".to_owned(),
                folder.join("state").display().to_string(),
            ),
        ];
        // All bound at the same time, so that the ports differ.
        let listeners: Vec<_> = ["8443", "9464", "8444", "8200"]
            .map(|port| (port, TcpListener::bind(("127.0.0.1", 0)).unwrap()))
            .into();
        for (port, listener) in &listeners {
            let free = listener.local_addr().unwrap().to_string();
            replacements.push((format!("127.0.0.1:{port}"), free));
        }
        let vault = replacements.last().unwrap().1.clone();
        let (program, examples, sim) = (
            env!("CARGO_BIN_EXE_credbroker"),
            built.join("examples"),
            built.join("credbroker-sim"),
        );
        let (examples, sim) = (examples.display(), sim.display());
        let admin = folder.join("admin.toml");
        let script = |name: &str, text: String| {
            let file = bin.join(name);
            fs::write(&file, format!("#!/bin/sh\n{text}")).unwrap();
            crate::harness::set_mode(&file, 0o755);
        };
        // Adds `--admin`, since admin.toml is not in /etc/credbroker.
        script(
            "credbroker",
            format!(
                "case $1 in keys|halt|resume|bots|budgets|clock) case \" $* \" in *' --admin '*) ;; *) exec {program} \"$@\" --admin {}; esac; esac\n\
                 exec {program} \"$@\"\n",
                admin.display()
            ),
        );
        // Runs programs that are already built.
        script(
            "cargo",
            format!(
                "command=$1; shift\n\
                 [ \"$1\" != --locked ] || shift\n\
                 case \"$command $1\" in\n\
                 'run --example') program={examples}/$2; shift 2;;\n\
                 'run -p') program={sim}; shift 2;;\n\
                 'run --') program=credbroker;;\n\
                 *) echo \"no cargo $command $*\" >&2; exit 64;;\nesac\n\
                 [ \"${{1-}}\" != -- ] || shift\n\
                 [ \"${{1-}}\" != vault ] || set -- \"$@\" --listen {vault}\n\
                 exec \"$program\" \"$@\"\n"
            ),
        );
        script("sudo", "shift 2\nexec \"$@\"\n".to_owned());
        let logs = scratch.path().display();
        script("journalctl", format!("cat {logs}/*.out\n"));
        Self {
            background: Vec::new(),
            folder,
            replacements,
            config: String::new(),
            scratch,
        }
    }

    /// Replaces the addresses and folders of the documents.
    fn fill_in(&self, text: &str) -> String {
        let fill = |text: String, (from, to): &(String, String)| text.replace(from, to);
        self.replacements.iter().fold(text.to_owned(), fill)
    }

    fn shell(&self, text: &str) -> Command {
        let mut paths = vec![self.scratch.path().join("bin")];
        paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap()));
        let mut command = Command::new("sh");
        command
            .args(["-euc", text])
            .env("PATH", std::env::join_paths(paths).unwrap())
            .current_dir(&self.folder)
            .process_group(0);
        command
    }

    /// Starts a command with its output in a file of its own.
    fn start(&mut self, text: &str, stdin: Stdio) -> Background {
        let number = fs::read_dir(self.scratch.path()).unwrap().count();
        let output = self.scratch.path().join(format!("{number}.out"));
        let file = File::create(&output).unwrap();
        let mut command = self.shell(text);
        command.stdin(stdin).stdout(file.try_clone().unwrap());
        let child = command.stderr(file).spawn().unwrap();
        Background { child, output }
    }

    /// Runs a command until it exits, and returns its status and output; the status is `None` after a timeout.
    fn run(&mut self, text: &str, stdin: Option<&str>) -> (Option<ExitStatus>, String) {
        let input = if stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        };
        let mut running = self.start(text, input);
        if let (Some(mut pipe), Some(text)) = (running.child.stdin.take(), stdin) {
            // Fails if the command has already exited.
            let _ = pipe.write_all(text.as_bytes());
        }
        let deadline = Instant::now() + BLOCK_WITHIN;
        let mut status = None;
        while status.is_none() && Instant::now() < deadline {
            status = running.child.try_wait().unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        let output = fs::read(&running.output).unwrap();
        (status, String::from_utf8_lossy(&output).into_owned())
    }

    /// Starts a background command, waits until it has printed `until`, and records the addresses that it prints.
    fn start_background(&mut self, text: &str, until: &str) -> Result<(), String> {
        let mut running = self.start(text, Stdio::null());
        let deadline = Instant::now() + BLOCK_WITHIN;
        let printed = loop {
            let output = fs::read(&running.output).unwrap();
            let output = String::from_utf8_lossy(&output).into_owned();
            if output.contains(until) {
                break output;
            }
            if Instant::now() > deadline || running.child.try_wait().unwrap().is_some() {
                return Err(format!("never printed {until:?}, but\n{output}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        for line in printed.lines() {
            let last = line.rsplit(' ').next().unwrap();
            let port = last.rsplit(':').next().unwrap();
            let replacement = match line.split_once(' ') {
                Some(("broker", rest)) if !rest.contains("http") => {
                    let address = rest.trim().split(' ').next().unwrap();
                    Some(("127.0.0.1:PORT", address))
                }
                Some(("certificates,", _)) => Some(("FOLDER", last)),
                Some(("simulated", rest)) if rest.starts_with("KuCoin, spot") => {
                    Some(("KUCOIN", last))
                }
                Some(("spot", _)) => Some((":SPOT", port)),
                Some(("futures", _)) => Some((":FUTURES", port)),
                _ => None,
            };
            if let Some((name, value)) = replacement {
                let colon = if name.starts_with(':') { ":" } else { "" };
                self.replacements
                    .push((name.to_owned(), format!("{colon}{value}")));
            }
        }
        self.background.push(running);
        Ok(())
    }

    /// Checks a block as a reader would use it.
    fn check(&mut self, block: &Block) -> Result<Done, String> {
        if let Some(reason) = block.note("not run") {
            assert!(!reason.is_empty(), "{}", block.location());
            return Ok(Done::NotRun(reason.to_owned()));
        }
        if let Some(tool) = block.note("needs").filter(|tool| !self.has(tool)) {
            let why = format!("{tool} is not installed");
            not_run(&block.location(), tool, &why);
            return Ok(Done::NotRun(why));
        }
        let text = self.fill_in(&block.text);
        if let Some(name) = block.note("file") {
            fs::write(self.folder.join(name), &text).unwrap();
        }
        match block.language.as_str() {
            "sh" => self.check_shell(block, &text).map(|()| Done::Run),
            "toml" => self.check_toml(&text).map(|()| Done::Parsed),
            "json" => check_json(&text).map(|()| Done::Parsed),
            "python" => self.check_python(block, &text),
            "rust" => self.check_rust(block, &text),
            "text" if block.notes.contains_key("output of the demo") => {
                self.compare(&text).map(|()| Done::Run)
            }
            "text" => Ok(Done::Text),
            other => Err(format!("no way to check a block in {other:?}")),
        }
    }

    fn has(&self, tool: &str) -> bool {
        if tool == "python" {
            return self.folder.join(".venv/bin/python").exists();
        }
        let found = self
            .shell(&format!("command -v {tool}"))
            .stdout(Stdio::null())
            .status();
        found.unwrap().success()
    }

    fn check_shell(&mut self, block: &Block, text: &str) -> Result<(), String> {
        if let Some(until) = block.note("background until") {
            return self.start_background(text, until);
        }
        if let Some(setup) = block.note("setup") {
            let (status, printed) = self.run(&self.fill_in(setup), None);
            if !status.is_some_and(|status| status.success()) {
                return Err(format!("its setup ended with {status:?}\n{printed}"));
            }
        }
        let stdin = block.note("stdin").map(|words| words.replace(' ', "\n"));
        let (status, printed) = self.run(text, stdin.as_deref());
        let expected = block.note("exit code").map_or(0, |note| {
            let code = note.split(',').next().unwrap();
            code.parse().unwrap()
        });
        match status.map(|status| status.code()) {
            Some(Some(code)) if code == expected => Ok(()),
            other => Err(format!(
                "ended with {other:?}, expected {expected}\n{printed}"
            )),
        }
    }

    fn check_toml(&mut self, text: &str) -> Result<(), String> {
        let has = |start: &str| text.lines().any(|line| line.starts_with(start));
        let problems = if has("[dependencies]") {
            return check_dependencies(text);
        } else if has("[account.") || has("[[grant]]") {
            Policy::parse(text).err()
        } else if has("broker =") {
            AdminFile::parse(text, &self.folder).err()
        } else if has("rules =") {
            text.clone_into(&mut self.config);
            Config::parse(text, &self.folder).err()
        } else {
            Config::parse(&with_tables(&self.config, text), &self.folder).err()
        };
        let Some(problems) = problems else {
            return Ok(());
        };
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        Err(problems.join("\n"))
    }

    fn check_python(&mut self, block: &Block, text: &str) -> Result<Done, String> {
        if !self.has("python3") {
            not_run(&block.location(), "python3", "no python3 on PATH");
            return Ok(Done::NotRun("no python3".to_owned()));
        }
        fs::write(self.folder.join("block.py"), text).unwrap();
        match self.run("python3 -m py_compile block.py", None) {
            (Some(status), _) if status.success() => Ok(Done::Compiled),
            (_, printed) => Err(printed),
        }
    }

    fn check_rust(&mut self, block: &Block, text: &str) -> Result<Done, String> {
        if let Some(file) = block.note("same as") {
            // Cargo has already compiled that program.
            let program = fs::read_to_string(Path::new(ROOT).join(file)).unwrap();
            let after = |text: &str| {
                let start = text.find("proto::broker_client").unwrap();
                text[start..].replace("credbroker::proto", "proto")
            };
            let (there, here) = (after(&program), after(&block.text));
            let mut lines = there.lines().zip(here.lines());
            return match lines.find(|(there, here)| there != here) {
                None if there == here => Ok(Done::Compiled),
                other => Err(format!("differs from {file}: {other:?}")),
            };
        }
        self.compile(text).map(|()| Done::Compiled)
    }

    /// Compiles a build script with the libraries that cargo has built for this project's own. Cargo may have built several
    /// versions, so this tries each combination.
    fn compile(&mut self, text: &str) -> Result<(), String> {
        fs::write(self.folder.join("block.rs"), text).unwrap();
        let libraries = built().join("deps");
        let all = |name: &str| -> Vec<PathBuf> {
            let files = fs::read_dir(&libraries).unwrap();
            let files = files.map(|file| file.unwrap().path());
            let start = format!("lib{name}-");
            let is_it = |file: &PathBuf| {
                let file = file.file_name().unwrap().to_string_lossy();
                file.starts_with(&start) && file.ends_with(".rlib")
            };
            files.filter(is_it).collect()
        };
        let (mut printed, deps) = ("no builds of protox".to_owned(), libraries.display());
        for protox in all("protox") {
            for prost in all("tonic_prost_build") {
                let (protox, prost) = (protox.display(), prost.display());
                let command = format!(
                    "rustc --edition 2024 --emit metadata -o block.rmeta -L dependency={deps} \
                     --extern protox={protox} --extern tonic_prost_build={prost} block.rs"
                );
                match self.run(&command, None) {
                    (Some(status), _) if status.success() => return Ok(()),
                    (_, other) => printed = other,
                }
            }
        }
        Err(printed)
    }

    /// Checks that the demo has printed these lines in this order, ignoring numbers and signatures.
    fn compare(&self, text: &str) -> Result<(), String> {
        let demo = self.background.first().ok_or("the demo is not running")?;
        let printed = fs::read_to_string(&demo.output).unwrap();
        let mut printed = printed.lines().map(masked);
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (start, is_whole) = match line.split_once('…') {
                Some((start, _)) => (masked(start), false),
                None => (masked(line), true),
            };
            let fits = |other: String| other == start || (!is_whole && other.starts_with(&start));
            if !printed.any(fits) {
                return Err(format!(
                    "the demo does not print this line, or not in this order: {line}"
                ));
            }
        }
        Ok(())
    }

    /// Fields in the audit logs of the demo and of the installation that docs/audit.md does not document.
    fn undocumented_fields(&self) -> BTreeSet<String> {
        let document = fs::read_to_string(Path::new(ROOT).join("docs/audit.md")).unwrap();
        let fields = |heading: &str, end: &str| -> BTreeSet<String> {
            let part = document.split(heading).nth(1).unwrap();
            let rows = part.split(end).next().unwrap().lines();
            let names = rows.filter_map(|row| row.strip_prefix("| ")?.split(" |").next());
            let names = names.flat_map(|names| names.split(", "));
            names
                .map(|name| name.trim_matches('`').to_owned())
                .collect()
        };
        let common = fields("## Fields of every line\n", "\n## ");
        let (mut lines, mut missing) = (0, BTreeSet::new());
        let demo = self.fill_in("FOLDER/state/audit.jsonl");
        let own = self.folder.join("state/audit.jsonl").display().to_string();
        for line in [demo, own].iter().flat_map(|file| {
            let text = fs::read_to_string(file).unwrap();
            text.lines().map(ToOwned::to_owned).collect::<Vec<_>>()
        }) {
            lines += 1;
            let line: serde_json::Map<String, Value> = serde_json::from_str(&line).unwrap();
            let event = line["event"].as_str().unwrap();
            let documented = fields(&format!("### `{event}`\n"), "\n#");
            for field in line.keys() {
                if !common.contains(field) && !documented.contains(field) {
                    missing.insert(format!("docs/audit.md: {event} has no field {field}"));
                }
            }
        }
        assert!(lines > 50, "{lines}");
        missing
    }
}

/// A line with every digit replaced by 0, and without the value of a signature.
fn masked(line: &str) -> String {
    let line = line.split_inclusive("KC-API-SIGN ").next().unwrap_or("");
    line.replace(|c: char| c.is_ascii_digit(), "0")
}

fn check_json(text: &str) -> Result<(), String> {
    // One value, or one value per line.
    let is_value = serde_json::from_str::<Value>(text).is_ok();
    for line in text.lines().filter(|_| !is_value) {
        serde_json::from_str::<Value>(line).map_err(|error| format!("{line}: {error}"))?;
    }
    Ok(())
}

/// Checks that the versions are those in this project's Cargo.toml.
fn check_dependencies(text: &str) -> Result<(), String> {
    let ours = fs::read_to_string(Path::new(ROOT).join("Cargo.toml")).unwrap();
    toml::from_str::<toml::Table>(text).map_err(|error| error.to_string())?;
    for line in text.lines().filter(|line| line.contains(" = ")) {
        let (name, rest) = line.split_once(" = ").unwrap();
        let version = rest.split('"').nth(1).unwrap();
        let is_ours = |line: &str| {
            let ours = line.strip_prefix(&format!("{name} = "));
            ours.is_some_and(|rest| rest.split('"').nth(1).unwrap_or("").starts_with(version))
        };
        if !ours.lines().any(is_ours) {
            return Err(format!("Cargo.toml has no {name} {version}"));
        }
    }
    Ok(())
}

/// A configuration in which the tables of `part` replace its own.
fn with_tables(config: &str, part: &str) -> String {
    let tables: BTreeSet<_> = part.lines().filter(|line| line.starts_with('[')).collect();
    let (mut merged, mut is_kept) = (String::new(), true);
    for line in config.lines() {
        if line.starts_with('[') {
            is_kept = !tables.contains(line);
        }
        if is_kept {
            let _ = writeln!(merged, "{line}");
        }
    }
    merged + "\n" + part
}

/// The folder of the programs that cargo has built.
fn built() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_credbroker"))
        .parent()
        .unwrap()
}

#[test]
fn code_blocks_of_the_documents_run_parse_and_compile() {
    let there = fs::read_dir(Path::new(ROOT).join("docs")).unwrap();
    for file in there {
        let name = format!("docs/{}", file.unwrap().file_name().to_string_lossy());
        assert!(DOCUMENTS.contains(&name.as_str()), "{name} is not checked");
    }
    for name in ["credbroker-sim", "examples/demo", "examples/bot"] {
        if !built().join(name).exists() {
            let why = format!("{name} is not built; cargo test --workspace builds it");
            not_run("blocks of the documents", "examples", &why);
            return;
        }
    }
    let mut reader = Reader::new(built());
    for tool in ["curl", "jq", "openssl"] {
        if !reader.has(tool) {
            let why = format!("no {tool} on PATH");
            not_run("blocks of the documents", tool, &why);
            return;
        }
    }
    let mut summary = format!(
        "{:28}{:>6}{:>8}{:>10}{:>9}{:>6}\n",
        "document", "run", "parsed", "compiled", "not run", "text"
    );
    let (mut reasons, mut failures) = (String::new(), Vec::new());
    for document in DOCUMENTS {
        let mut counts = [0; 5];
        for block in blocks_of(document) {
            let location = block.location();
            match reader.check(&block) {
                Ok(done) => {
                    if let Done::NotRun(reason) = &done {
                        let _ = writeln!(reasons, "not run: {location}: {reason}");
                    }
                    let column = match done {
                        Done::Run => 0,
                        Done::Parsed => 1,
                        Done::Compiled => 2,
                        Done::NotRun(_) => 3,
                        Done::Text => 4,
                    };
                    counts[column] += 1;
                }
                Err(failure) => failures.push(format!("{location}: {failure}\n{}", block.text)),
            }
        }
        let [run, parsed, compiled, not_run, text] = counts;
        let _ = writeln!(
            summary,
            "{document:28}{run:>6}{parsed:>8}{compiled:>10}{not_run:>9}{text:>6}"
        );
    }
    print_always(&format!("{summary}{reasons}"));
    failures.extend(reader.undocumented_fields());
    assert!(
        failures.is_empty(),
        "{} problems:\n{}",
        failures.len(),
        failures.join("\n")
    );
}
