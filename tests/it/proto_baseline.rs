//! The contract has no breaking changes: everything in `proto/baseline.binpb` is still in `proto/`, unchanged.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use protox::Compiler;
use protox::prost_reflect::{Cardinality, DescriptorPool, EnumDescriptor, MessageDescriptor};

/// A `FileDescriptorSet` of `proto/`: the contract that clients rely on.
const BASELINE: &str = "proto/baseline.binpb";

/// If this variable is set, the test writes the baseline instead of comparing with it.
const WRITE: &str = "CREDBROKER_WRITE_BASELINE";

/// The parts of a contract: name and definition.
type Parts = BTreeMap<String, String>;

/// Compiles every file of `proto/credbroker/v1/`.
fn compiled(proto: &Path) -> DescriptorPool {
    let mut files: Vec<_> = fs::read_dir(proto.join("credbroker/v1"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let mut compiler = Compiler::new([proto]).unwrap();
    compiler.include_imports(true).open_files(files).unwrap();
    compiler.descriptor_pool()
}

fn baseline() -> DescriptorPool {
    DescriptorPool::decode(fs::read(BASELINE).unwrap().as_slice()).unwrap()
}

fn parts(pool: &DescriptorPool) -> Parts {
    let mut parts = Parts::new();
    for message in pool.all_messages() {
        add_message(&mut parts, &message);
    }
    for list in pool.all_enums() {
        add_enum(&mut parts, &list);
    }
    for service in pool.services() {
        parts.insert(format!("service {}", service.full_name()), String::new());
        for method in service.methods() {
            let stream = |is_stream| if is_stream { "stream " } else { "" };
            let signature = format!(
                "({}{}) returns ({}{})",
                stream(method.is_client_streaming()),
                method.input().full_name(),
                stream(method.is_server_streaming()),
                method.output().full_name()
            );
            parts.insert(format!("rpc {}", method.full_name()), signature);
        }
    }
    parts
}

fn add_message(parts: &mut Parts, message: &MessageDescriptor) {
    let name = message.full_name();
    parts.insert(format!("message {name}"), String::new());
    for field in message.fields() {
        let oneof = field
            .containing_oneof()
            .filter(|oneof| !oneof.is_synthetic());
        let label = if field.cardinality() == Cardinality::Repeated {
            "repeated "
        } else if field.supports_presence() && oneof.is_none() {
            "optional "
        } else {
            ""
        };
        let kind = format!(
            "{label}{:?} {}{}",
            field.kind(),
            field.name(),
            oneof.map_or(String::new(), |oneof| format!(" of {}", oneof.name()))
        );
        parts.insert(format!("{name} number {}", field.number()), kind);
    }
    let numbers = message.reserved_ranges().flatten().map(i64::from);
    add_reserved(parts, name, numbers, message.reserved_names());
}

fn add_enum(parts: &mut Parts, list: &EnumDescriptor) {
    let name = list.full_name();
    parts.insert(format!("enum {name}"), String::new());
    for value in list.values() {
        let number = format!("{name} number {}", value.number());
        parts.insert(number, value.name().to_owned());
    }
    let numbers = list.reserved_ranges().flatten().map(i64::from);
    add_reserved(parts, name, numbers, list.reserved_names());
}

fn add_reserved<'n>(
    parts: &mut Parts,
    owner: &str,
    numbers: impl Iterator<Item = i64>,
    names: impl Iterator<Item = &'n str>,
) {
    for (count, number) in numbers.enumerate() {
        assert!(
            count < 1000,
            "{owner}: reserve only the numbers that were in use"
        );
        parts.insert(format!("{owner} number {number}"), "reserved".to_owned());
    }
    for name in names {
        parts.insert(format!("{owner} name {name}"), "reserved".to_owned());
    }
}

/// The breaking changes: a line for each part of `old` that is missing or different in `new`.
fn breaking_changes(old: &Parts, new: &Parts) -> Vec<String> {
    let mut lines = Vec::new();
    for (part, was) in old {
        match new.get(part) {
            None if was.is_empty() => lines.push(format!("{part} is missing")),
            None => lines.push(format!("{part} is missing, was {was}")),
            Some(is) if is != was => lines.push(format!("{part} is {is}, was {was}")),
            Some(_) => {}
        }
    }
    lines
}

/// The numbers of `old` that `new` neither uses nor reserves, although it still has the message or enum.
fn unreserved_numbers(old: &Parts, new: &Parts) -> Vec<String> {
    let is_unreserved = |part: &&String| {
        let owner = part.split_once(" number ").map(|(owner, _)| owner);
        let exists = |owner| {
            new.contains_key(&format!("message {owner}"))
                || new.contains_key(&format!("enum {owner}"))
        };
        owner.is_some_and(exists) && !new.contains_key(*part)
    };
    old.keys().filter(is_unreserved).cloned().collect()
}

#[test]
fn contract_has_no_breaking_changes() {
    let pool = compiled(Path::new("proto"));
    let new = parts(&pool);
    if std::env::var_os(WRITE).is_some() {
        if Path::new(BASELINE).exists() {
            let old = parts(&baseline());
            let unreserved = unreserved_numbers(&old, &new);
            assert!(
                unreserved.is_empty(),
                "reserve these numbers: {unreserved:#?}"
            );
            for line in breaking_changes(&old, &new) {
                println!("breaking change: {line}");
            }
        }
        fs::write(BASELINE, pool.encode_to_vec()).unwrap();
        return;
    }
    let lines = breaking_changes(&parts(&baseline()), &new);
    assert!(
        lines.is_empty(),
        "breaking changes (CONTRIBUTING.md, \"Change the API\"): {lines:#?}"
    );
}

#[test]
fn the_baseline_has_every_service() {
    let old = parts(&baseline());
    for name in ["credbroker.v1.Admin", "credbroker.v1.Broker"] {
        assert!(old.contains_key(&format!("service {name}")), "{name}");
    }
}

/// The contract of a proto file with these lines.
fn contract(lines: &str) -> Parts {
    let folder = tempfile::tempdir().unwrap();
    let package = folder.path().join("credbroker/v1");
    fs::create_dir_all(&package).unwrap();
    let text = format!("syntax = \"proto3\";\npackage p;\n{lines}");
    fs::write(package.join("a.proto"), text).unwrap();
    parts(&compiled(folder.path()))
}

const SMALL: &str = "
message Ask {
  string account = 1;
  optional string key = 2;
  repeated uint32 numbers = 3;
  reserved 4, 6 to 7;
  reserved \"old\";
  oneof which { bool all = 8; string one = 9; }
}
message Answer { Kind kind = 1; }
enum Kind {
  KIND_UNSPECIFIED = 0;
  KIND_A = 1;
  reserved 5;
}
service Api {
  rpc Get(Ask) returns (Answer);
  rpc Watch(Ask) returns (stream Answer);
}
";

#[test]
fn every_breaking_change_is_listed() {
    let old = contract(SMALL);
    for (from, to, expected) in [
        (
            "  string account = 1;",
            "",
            "p.Ask number 1 is missing, was string account",
        ),
        (
            "  string account = 1;",
            "  reserved 1;",
            "p.Ask number 1 is reserved, was string account",
        ),
        (
            "account = 1",
            "account = 21",
            "p.Ask number 1 is missing, was string account",
        ),
        (
            "string account",
            "bytes account",
            "p.Ask number 1 is bytes account, was string account",
        ),
        (
            "string account",
            "repeated string account",
            "p.Ask number 1 is repeated string account, was string account",
        ),
        (
            "string account",
            "string name",
            "p.Ask number 1 is string name, was string account",
        ),
        (
            "optional string key",
            "string key",
            "p.Ask number 2 is string key, was optional string key",
        ),
        (
            "reserved 4, 6 to 7;",
            "reserved 4, 6;",
            "p.Ask number 7 is missing, was reserved",
        ),
        (
            "reserved 4, 6 to 7;",
            "reserved 6 to 7; string again = 4;",
            "p.Ask number 4 is string again, was reserved",
        ),
        (
            "reserved \"old\";",
            "",
            "p.Ask name old is missing, was reserved",
        ),
        (
            "string one = 9; }",
            "} string one = 9;",
            "p.Ask number 9 is string one, was string one of which",
        ),
        (
            "  KIND_A = 1;",
            "",
            "p.Kind number 1 is missing, was KIND_A",
        ),
        ("KIND_A", "KIND_B", "p.Kind number 1 is KIND_B, was KIND_A"),
        (
            "reserved 5;",
            "",
            "p.Kind number 5 is missing, was reserved",
        ),
        (
            "  rpc Get(Ask) returns (Answer);",
            "",
            "rpc p.Api.Get is missing, was (p.Ask) returns (p.Answer)",
        ),
        (
            "(stream Answer)",
            "(Answer)",
            "rpc p.Api.Watch is (p.Ask) returns (p.Answer), was (p.Ask) returns (stream p.Answer)",
        ),
    ] {
        assert!(SMALL.contains(from), "{from}");
        let lines = breaking_changes(&old, &contract(&SMALL.replacen(from, to, 1)));
        assert_eq!(lines, [expected], "{from} -> {to}");
    }
    let renamed = breaking_changes(&old, &contract(&SMALL.replace("Answer", "Reply")));
    assert!(renamed.contains(&"message p.Answer is missing".to_owned()));
    let without = SMALL.split("service").next().unwrap();
    let without = breaking_changes(&old, &contract(without));
    assert!(without.contains(&"service p.Api is missing".to_owned()));
}

#[test]
fn additions_to_the_contract_are_allowed() {
    let grown = SMALL
        .replace(
            "message Answer {",
            "message More {}\nmessage Answer { More more = 2;",
        )
        .replace("KIND_A = 1;", "KIND_A = 1; KIND_B = 2;")
        .replace("reserved 5;", "reserved 5 to 6;")
        .replace(
            "service Api {",
            "service Api { rpc Put(Ask) returns (More);",
        );
    assert_eq!(
        breaking_changes(&contract(SMALL), &contract(&grown)),
        [""; 0]
    );
}

#[test]
fn removed_numbers_must_be_reserved_in_a_new_baseline() {
    let old = contract(SMALL);
    let field = "  string account = 1;\n";
    let without = contract(&SMALL.replace(field, ""));
    assert_eq!(unreserved_numbers(&old, &without), ["p.Ask number 1"]);
    let reserved = contract(&SMALL.replace(field, "  reserved 1;\n"));
    assert_eq!(unreserved_numbers(&old, &reserved), [""; 0]);
    let value = contract(&SMALL.replace("  KIND_A = 1;\n", ""));
    assert_eq!(unreserved_numbers(&old, &value), ["p.Kind number 1"]);
    let renamed = contract(&SMALL.replace("Answer", "Reply"));
    assert_eq!(unreserved_numbers(&old, &renamed), [""; 0]);
}
