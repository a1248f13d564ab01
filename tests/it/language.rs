//! The English of the program: a list of all that it prints, and the wording that no file may hold.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// One string of the code, or one line of help.
struct Sentence {
    place: String,
    kind: Kind,
    text: String,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Error,
    Help,
    Log,
    Text,
}

const LOG_MACROS: [&str; 5] = ["debug", "error", "info", "trace", "warn"];

/// Files below `folder` with one of these extensions.
fn files_in(folder: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join(folder)];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            if path.is_dir() {
                folders.push(path);
            } else if extension.is_some_and(|extension| extensions.contains(&extension)) {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

fn is_ident(token: Option<&TokenTree>, name: &str) -> bool {
    matches!(token, Some(TokenTree::Ident(ident)) if ident == name)
}

fn is_punct(token: Option<&TokenTree>, char: char) -> bool {
    matches!(token, Some(TokenTree::Punct(punct)) if punct.as_char() == char)
}

/// What an attribute is for: `error` of `#[error("…")]`.
fn attribute_name(attribute: &Group) -> String {
    let name = attribute.stream().into_iter().next();
    name.map(|name| name.to_string()).unwrap_or_default()
}

fn is_test_only(attribute: &Group) -> bool {
    let text = attribute.stream().to_string().replace(' ', "");
    text == "cfg(test)" || text == "test"
}

/// The value of a string literal; `None` for numbers, characters and bytes.
fn string_value(literal: &str) -> Option<String> {
    let inner = literal.strip_suffix('#').unwrap_or(literal);
    if let Some(raw) = literal.strip_prefix('r') {
        let inner = raw.trim_matches('#');
        return Some(inner.strip_prefix('"')?.strip_suffix('"')?.to_owned());
    }
    let inner = inner.strip_prefix('"')?.strip_suffix('"')?;
    let mut value = String::new();
    let mut chars = inner.chars().peekable();
    while let Some(char) = chars.next() {
        match (char, chars.peek()) {
            // A line that goes on in the next one.
            ('\\', Some('\n')) => while chars.next_if(|next| next.is_whitespace()).is_some() {},
            ('\\', Some('"' | '\\')) => value.extend(chars.next()),
            _ => value.push(char),
        }
    }
    Some(value)
}

/// Adds the strings of `tokens`, without those of tests and of attributes: help comes from the program.
fn collect(tokens: TokenStream, file: &str, kind: Kind, found: &mut Vec<Sentence>) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let mut index = 0;
    while let Some(token) = tokens.get(index) {
        index += 1;
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                index += usize::from(is_punct(tokens.get(index), '!'));
                let Some(TokenTree::Group(attribute)) = tokens.get(index) else {
                    continue;
                };
                index += 1;
                match attribute_name(attribute).as_str() {
                    "error" => collect(attribute.stream(), file, Kind::Error, found),
                    _ if is_test_only(attribute) => {
                        // The item that it belongs to ends with its braces or its semicolon.
                        while let Some(token) = tokens.get(index) {
                            index += 1;
                            let ends = matches!(token, TokenTree::Group(group) if group.delimiter() == Delimiter::Brace);
                            if ends || is_punct(Some(token), ';') {
                                break;
                            }
                        }
                    }
                    _ => {}
                }
            }
            TokenTree::Group(group) => {
                let is_macro = index >= 3 && is_punct(tokens.get(index - 2), '!');
                let is_log = is_macro
                    && LOG_MACROS
                        .iter()
                        .any(|name| is_ident(tokens.get(index - 3), name));
                collect(
                    group.stream(),
                    file,
                    if is_log { Kind::Log } else { kind },
                    found,
                );
            }
            TokenTree::Literal(literal) => {
                if let Some(text) = string_value(&literal.to_string()) {
                    let line = literal.span().start().line;
                    let place = format!("{file}:{line}");
                    found.push(Sentence { place, kind, text });
                }
            }
            TokenTree::Ident(_) | TokenTree::Punct(_) => {}
        }
    }
}

/// Names of the fields in the arguments of a log macro: `account.id = %account`, `%error`, `suppressed`.
fn fields(arguments: &[TokenTree], found: &mut BTreeSet<String>) {
    for argument in arguments.split(|token| is_punct(Some(token), ',')) {
        let start = argument
            .iter()
            .position(|token| !is_punct(Some(token), '%') && !is_punct(Some(token), '?'));
        let argument = &argument[start.unwrap_or_default()..];
        let end = argument.iter().position(|token| is_punct(Some(token), '='));
        let name: String = argument[..end.unwrap_or(argument.len())]
            .iter()
            .map(ToString::to_string)
            .collect();
        let name = name.trim_matches('"');
        let is_name = |char: char| char.is_ascii_lowercase() || "._-".contains(char);
        if !name.is_empty()
            && name.chars().all(is_name)
            && (end.is_some() || matches!(argument, [TokenTree::Ident(_)]))
        {
            found.insert(name.to_owned());
        }
    }
}

/// Calls `visit` with the arguments of each log macro.
fn log_macros(tokens: TokenStream, visit: &mut impl FnMut(&[TokenTree])) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    for (index, token) in tokens.iter().enumerate() {
        let TokenTree::Group(group) = token else {
            continue;
        };
        // `$level!` is the name of a log macro in a macro of ours.
        let is_log = index >= 3
            && is_punct(tokens.get(index - 1), '!')
            && (is_punct(tokens.get(index - 3), '$')
                || (LOG_MACROS.iter().chain(&["info_span"]))
                    .any(|name| is_ident(tokens.get(index - 2), name)));
        if is_log {
            visit(&group.stream().into_iter().collect::<Vec<_>>());
        } else {
            log_macros(group.stream(), visit);
        }
    }
}

/// At least two words, with a space: not a name, a header or a format of numbers.
fn is_sentence(text: &str) -> bool {
    let words = text.split([' ', '\n']).filter(|word| {
        let letters = word.chars().filter(char::is_ascii_alphabetic).count();
        letters >= 2 && !word.contains('{')
    });
    words.count() >= 2
}

/// What `--help` prints for each command, from the program itself.
fn help() -> Vec<Sentence> {
    let pages = files_in("deploy/man", &["1"]);
    let mut found = Vec::new();
    for page in pages {
        let page = page.file_stem().unwrap().to_str().unwrap().to_owned();
        let words = page.split('-').skip(1);
        // `check-config` and `accept-gap` are one word each.
        let words = words.collect::<Vec<_>>().join(" ");
        let words = words.replace("check config", "check-config");
        let words = words.replace("accept gap", "accept-gap");
        let output = Command::new(env!("CARGO_BIN_EXE_credbroker"))
            .args(words.split_whitespace())
            .arg("--help")
            .output()
            .unwrap();
        assert!(output.status.success(), "{page}");
        let text = String::from_utf8(output.stdout).unwrap();
        for (number, line) in (1..).zip(text.lines().map(str::trim)) {
            let place = format!("{page} --help:{number}");
            let (kind, text) = (Kind::Help, line.to_owned());
            found.push(Sentence { place, kind, text });
        }
    }
    found
}

fn sentences() -> Vec<Sentence> {
    let mut found = Vec::new();
    for path in files_in("src", &["rs"]) {
        let code = std::fs::read_to_string(&path).unwrap();
        let tokens: TokenStream = code.parse().unwrap();
        let file = path.strip_prefix(env!("CARGO_MANIFEST_DIR")).unwrap();
        collect(tokens, &file.display().to_string(), Kind::Text, &mut found);
    }
    found.extend(help());
    let mut seen = BTreeSet::new();
    found.retain(|sentence| sentence.kind != Kind::Help || seen.insert(sentence.text.clone()));
    found.retain(|sentence| sentence.kind == Kind::Log || is_sentence(&sentence.text));
    found
}

/// Writes `sentences.txt` into the folder for files of tests: whoever changes texts reads them there as a user would.
#[test]
fn every_sentence_is_listed_and_ends_as_its_kind_should() {
    let sentences = sentences();
    let mut list = String::new();
    let mut wrong = Vec::new();
    for Sentence { place, kind, text } in &sentences {
        let kind_name = format!("{kind:?}").to_lowercase();
        writeln!(list, "{place} {kind_name}: {}", text.replace('\n', "\\n")).unwrap();
        if matches!(kind, Kind::Error | Kind::Log) && text.ends_with('.') {
            wrong.push(format!("{place}: ends with a full stop: {text}"));
        }
        if text.contains("  ") && *kind != Kind::Help && !text.contains('\n') {
            wrong.push(format!("{place}: two spaces: {text}"));
        }
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sentences.txt");
    std::fs::write(&file, &list).unwrap();
    println!("{} sentences: {}", sentences.len(), file.display());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (expected, kind) in [
        ("key loaded", Kind::Log),
        (
            "internal error; the log and the audit log show how far the call got",
            Kind::Error,
        ),
        ("Print help (see a summary with '-h')", Kind::Help),
    ] {
        let is_listed = |sentence: &Sentence| sentence.kind == kind && sentence.text == expected;
        assert!(sentences.iter().any(is_listed), "{kind:?}: {expected}");
    }
}

#[test]
fn every_log_field_is_documented_and_every_documented_one_exists() {
    let mut logged = BTreeSet::new();
    for path in files_in("src", &["rs"]) {
        let code = std::fs::read_to_string(&path).unwrap();
        log_macros(code.parse().unwrap(), &mut |arguments| {
            fields(arguments, &mut logged);
        });
    }
    let table = include_str!("../../docs/operations.md")
        .split("\n## Log fields\n")
        .nth(1)
        .unwrap();
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented: BTreeSet<_> = rows
        .flat_map(|row| row.split(" |").next().unwrap().split(", "))
        .map(|name| name.trim_matches('`').to_owned())
        .collect();
    assert_eq!(logged, documented);
}

/// Wording that a reader has to translate, and names that lie. `CONTRIBUTING.md` says how to write instead. Words that
/// end with `_` are the beginning of names.
const BANNED: [&str; 52] = [
    "a run before this one",
    "add_risk",
    "adding risk",
    "adds risk",
    "anew",
    "are told",
    "as it stands",
    "as they stand",
    "begins to be",
    "cannot be asked",
    "cannot be told",
    "door",
    "doors",
    "doubts",
    "ended early",
    "good until",
    "heed",
    "heeds",
    "in force now",
    "is begun",
    "is it kucoin",
    "is told",
    "is_calm",
    "is_own",
    "is_to_be_judged",
    "learnt",
    "let through",
    "look_again",
    "look_now",
    "looks again",
    "mend",
    "mended",
    "no time at all",
    "nobody's",
    "not this key's",
    "on record",
    "put_to_use",
    "same command again",
    "serve on",
    "serves on",
    "shall",
    "somebody's",
    "stranger",
    "strangers",
    "taken up",
    "untold",
    "what adds",
    "what is forbidden",
    "whoever",
    "withdraw_",
    "withdrawn",
    "worth another",
];

/// Where one of them is right: the phrase, and the words around it.
const ALLOWED: [(&str, &str); 1] = [("shall", "no \"shall\"")];

/// The text without line breaks and the marks of comments, so that a phrase is found across lines.
fn in_one_line(text: &str) -> String {
    let lines = text.lines().map(|line| {
        let line = line.trim_start();
        let comment = ["///", "//!", "//", "#"]
            .iter()
            .find_map(|mark| line.strip_prefix(mark));
        comment.unwrap_or(line).trim_end_matches('\\').trim()
    });
    lines.collect::<Vec<_>>().join(" ").to_lowercase()
}

#[test]
fn no_file_uses_a_banned_phrase() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let of_root = [
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "README.md",
        "SECURITY.md",
    ];
    let mut files: Vec<_> = of_root.map(|name| root.join(name)).into();
    for folder in [
        "benches", "deploy", "docs", "examples", "proto", "src", "tests",
    ] {
        files.extend(files_in(folder, &["md", "proto", "py", "rs", "toml"]));
    }
    let this_file = root.join(file!());
    files.retain(|path| *path != this_file);
    assert!(files.len() > 150, "{}", files.len());
    let mut found = Vec::new();
    for path in files {
        let text = format!(
            " {} ",
            in_one_line(&std::fs::read_to_string(&path).unwrap())
        );
        for phrase in BANNED {
            for (at, _) in text.match_indices(phrase) {
                let (before, after) = (&text[..at], &text[at + phrase.len()..]);
                // Whole words: `shall` is not in `marshall`.
                let is_word = !before.ends_with(char::is_alphanumeric)
                    && (phrase.ends_with('_') || !after.starts_with(char::is_alphanumeric));
                let is_allowed = ALLOWED.iter().any(|(allowed, around)| {
                    *allowed == phrase
                        && around.match_indices(phrase).any(|(offset, _)| {
                            before.ends_with(&around[..offset])
                                && after.starts_with(&around[offset + phrase.len()..])
                        })
                });
                if is_word && !is_allowed {
                    let context: String = after.chars().take(40).collect();
                    let path = path.strip_prefix(root).unwrap().display();
                    found.push(format!("{path}: {phrase:?}: …{phrase}{context}"));
                }
            }
        }
    }
    assert_eq!(found, [""; 0], "write it in plain words: CONTRIBUTING.md");
}
