//! Malformed tokens, keys and files are rejected with a description of their format and the fix.

use std::path::Path;

use credbroker_sim::installation::{ROOT_TOKEN, Settings};

use super::Setup;
use super::register::{StoredKeys, key, run, settings};
use super::succession::refresh;
use crate::harness::{Lab, in_one_line, program};

const FIELD_CASES: &str = "tests/field-cases/files";

/// The token in every field case.
const TOKEN: &str = "s.fieldcase";

fn utf16(text: &str) -> Vec<u8> {
    let units = std::iter::once(0xfeff).chain(text.encode_utf16());
    units.flat_map(u16::to_le_bytes).collect()
}

/// Each malformed token file with its expected error.
fn tokens() -> Vec<(Vec<u8>, &'static str)> {
    let file = |name: &str| std::fs::read(Path::new(FIELD_CASES).join(name)).unwrap();
    vec![
        (
            file("token-in-quotes"),
            "the token is in quotes; remove the quotes",
        ),
        (
            file("token-as-assignment"),
            "it is an assignment (NAME=TOKEN); write only the TOKEN part",
        ),
        (
            b"export VAULT_TOKEN=s.fieldcase\n".to_vec(),
            "it is an assignment (NAME=TOKEN); write only the TOKEN part",
        ),
        (
            file("token-as-json"),
            "it is JSON; write only the token value, for example with `jq -r .auth.client_token`",
        ),
        (
            file("token-utf8-bom"),
            "it begins with a byte order mark; save it as UTF-8 without BOM, or as ASCII",
        ),
        (
            utf16("s.fieldcase\r\n"),
            "it is UTF-16, which PowerShell's `>` writes; save it as ASCII, for example with `Set-Content -Encoding ascii`",
        ),
        (
            b"s.field case\n".to_vec(),
            "expected one line of printable ASCII without spaces",
        ),
        (
            b" \n".to_vec(),
            "it is empty; expected one line of printable ASCII without spaces",
        ),
    ]
}

#[tokio::test]
async fn malformed_token_file_is_reported_with_the_fix() {
    let rig = Setup::new(&["main"]).await.ready().await;
    let file = rig.lab.path("token");
    for (bytes, expected) in tokens() {
        std::fs::write(&file, bytes).unwrap();
        refresh(&rig.lab).await;
        let (_, text) = rig.lab.get("/readyz").await;
        let problem = format!("invalid credential file in vault.auth: {expected}");
        assert!(text.contains(&problem), "{problem:?} is not in {text}");
        assert!(!text.contains(TOKEN), "{text}");
    }
    rig.lab
        .replace("token", &format!("{ROOT_TOKEN}\n"))
        .unwrap();
    assert_eq!(refresh(&rig.lab).await, 1);
    let (_, text) = rig.lab.get("/readyz").await;
    assert!(!text.contains("vault.auth"), "{text}");
    rig.end().await;
}

#[tokio::test]
async fn admin_commands_report_a_malformed_token_file() {
    let lab = super::register::lab(settings()).await;
    for (bytes, expected) in tokens() {
        std::fs::write(lab.path("token"), bytes).unwrap();
        let (code, output) = run(&lab, &["keys", "rotate", "other"], &key(1, &[]), "").await;
        assert_eq!(code, 1, "{output}");
        assert!(output.contains(expected), "{expected:?} is not in {output}");
        assert!(!output.contains(TOKEN), "{output}");
    }
}

#[tokio::test]
async fn doctor_reports_a_malformed_token_file() {
    let lab = Lab::install(Settings::default()).await;
    for (bytes, expected) in tokens() {
        std::fs::write(lab.path("token"), bytes).unwrap();
        let output = in_one_line(&lab.run(&["doctor"]).await.stdout);
        assert!(output.contains(expected), "{expected:?} is not in {output}");
        assert!(!output.contains("that the agent"), "{output}");
        assert!(!output.contains(TOKEN), "{output}");
    }
}

#[tokio::test]
async fn utf16_key_input_is_rejected_with_the_fix_and_nothing_is_stored() {
    let lab = super::register::lab(settings()).await;
    let stored = StoredKeys::of(&lab);
    let file = std::fs::read(Path::new(FIELD_CASES).join("key-utf16le-bom.json")).unwrap();
    // The same without its byte order mark, and with swapped bytes.
    let bare = file[2..].to_vec();
    let swapped = file.chunks(2).flat_map(|pair| [pair[1], pair[0]]).collect();
    for input in [file, bare, swapped] {
        let output = lab.cli(&["keys", "register", "spot"], input).await;
        assert_eq!(output.code, Some(1), "{output:?}");
        let stderr = output.stderr_line();
        for part in [
            "expected text in UTF-8, got UTF-16, which PowerShell's `>` writes; nothing was stored",
            "fix: convert it, for example with `iconv -f UTF-16 -t UTF-8 key.json`, or write it with `Out-File -Encoding utf8`",
        ] {
            assert!(stderr.contains(part), "{part:?} is not in {stderr}");
        }
        assert!(!stderr.contains("0123456789abcdef"), "{stderr}");
    }
    assert_eq!(stored.newest("spot").await, 0);
}

#[tokio::test]
async fn utf16_config_and_rules_files_are_rejected_with_the_fix() {
    let lab = Lab::install(Settings::default()).await;
    let text = std::fs::read_to_string(lab.path("config.toml")).unwrap();
    let rules = std::fs::read_to_string(lab.path("rules.toml")).unwrap();
    std::fs::write(lab.path("rules-utf16.toml"), utf16(&rules)).unwrap();
    std::fs::write(lab.path("config-utf16.toml"), utf16(&text)).unwrap();
    let other = text.replace("rules.toml", "rules-utf16.toml");
    std::fs::write(lab.path("other.toml"), other).unwrap();
    for file in ["config-utf16.toml", "other.toml"] {
        let file = lab.path(file);
        let words = ["check-config", "--config", file.to_str().unwrap()];
        let stderr = program(&words, "").await.stderr;
        let expected = "is UTF-16, which PowerShell's `>` writes; save it as UTF-8";
        assert!(stderr.contains(expected), "{stderr}");
    }
}
