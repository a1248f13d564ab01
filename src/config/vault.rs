//! `[vault]`: where Vault is and how the broker logs in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use url::Url;

use super::is_loopback;
use crate::keyring::vault::{Auth, VaultSettings};
use crate::toml_file::Section;

/// Reads `[vault]`, all but what stands in [`Config`](super::Config) beside it.
pub(super) fn read(section: &mut Section, folder: &Path) -> Option<VaultSettings> {
    let address = section.required("address", "\"https://vault.example.org:8200\"");
    let address = address.and_then(|text: String| vault_address(section, "address", &text));
    let redirects: Vec<String> = section.optional("redirects").unwrap_or_default();
    let redirects = redirects
        .iter()
        .filter_map(|text| vault_address(section, "redirects", text))
        .collect();
    let namespace: Option<String> = section.optional("namespace");
    if namespace
        .as_ref()
        .is_some_and(|name| name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()))
    {
        section.problem("namespace", "expected printable ASCII without spaces");
    }
    let mount = kv_path(section, "mount", "kv");
    let prefix = kv_path(section, "prefix", "kucoin/prod");
    // The time limit of a whole request; the background waits for it, never a bot.
    let timeout = Duration::from_millis(section.number("timeout_ms", 3000, 100..=60_000));
    let auth = auth(&mut section.section("auth"), folder);
    Some(VaultSettings {
        address: address?,
        redirects,
        namespace,
        mount,
        prefix,
        auth: auth?,
        timeout,
    })
}

fn vault_address(section: &Section, key: &str, text: &str) -> Option<Url> {
    let problem = match Url::parse(text) {
        Ok(url)
            if url.path() != "/"
                || url.query().is_some()
                || !url.username().is_empty()
                || url.password().is_some() =>
        {
            "expected scheme, host and port alone; Vault behind a path does not work".to_owned()
        }
        Ok(url) if url.scheme() == "https" || (url.scheme() == "http" && is_loopback(&url)) => {
            return Some(url);
        }
        Ok(url) => format!("expected https, or http on loopback, got {}", url.scheme()),
        Err(error) => format!("expected a URL such as https://vault.example.org:8200: {error}"),
    };
    section.problem(key, problem);
    None
}

fn kv_path(section: &mut Section, key: &'static str, default: &str) -> String {
    let text: String = section.optional(key).unwrap_or_else(|| default.to_owned());
    let segment = |s: &str| {
        !matches!(s, "" | "." | "..")
            && s.bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    if !text.split('/').all(segment) {
        section.problem(
            key,
            format_args!(
                "expected names separated by single '/', such as {default:?}, got {text:?}"
            ),
        );
    }
    text
}

fn auth(section: &mut Section, folder: &Path) -> Option<Auth> {
    match section
        .required::<String>("method", "\"token_file\"")?
        .as_str()
    {
        "approle" => {
            let mount = kv_path(section, "mount", "approle");
            let role_id = section.required("role_id", "\"00000000-0000-0000-0000-000000000000\"");
            let file = section.required::<PathBuf>(
                "secret_id_file",
                "\"/run/credentials/credbroker/secret-id\"",
            );
            Some(Auth::AppRole {
                mount,
                role_id: role_id?,
                secret_id_file: folder.join(file?),
            })
        }
        "token_file" => {
            let file = section.required::<PathBuf>("file", "\"/run/vault-agent/token\"")?;
            Some(Auth::TokenFile(folder.join(file)))
        }
        other => {
            section.problem(
                "method",
                format_args!("expected \"token_file\" or \"approle\", got {other:?}"),
            );
            section.ignore_rest();
            None
        }
    }
}
