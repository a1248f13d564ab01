//! `credbroker keys revoke`: takes effect at once, with or without Vault.

use std::path::PathBuf;

use clap::Args;

use crate::cli::admin::{self, ADMIN, Client};
use crate::cli::confirm::confirm;
use crate::cli::text::paragraph;
use crate::cli::{DECIDE_WITHIN, DONE, show};
use crate::proto::{RevokeKeyRequest, RevokedKey};

#[derive(Args, Debug)]
pub(in crate::cli) struct Which {
    /// Account, as named in the rules.
    account: String,
    /// Path of admin.toml, which has the address of the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
    /// Key to revoke. Default: every key of the account.
    #[arg(long)]
    key: Option<String>,
    /// Skip the confirmation when --key is missing.
    #[arg(long)]
    yes: bool,
}

pub(super) fn revoke(which: &Which) -> u8 {
    let Which {
        account,
        admin: file,
        key,
        yes,
    } = which;
    let detail = format!(
        "permanently revokes every key of account {account}: only a key with a new id can trade there again. To revoke a single key, use \
         --key NAME"
    );
    if key.is_none()
        && let Err(code) = confirm(&detail, *yes)
    {
        return code;
    }
    admin::run(file, async |mut admin| {
        let request = RevokeKeyRequest {
            account: account.clone(),
            key: key.clone().unwrap_or_default(),
        };
        let revoke = async |client: &mut Client, request| client.revoke_key(request).await;
        let response = admin.ask(DECIDE_WITHIN, request, revoke).await?;
        Ok(show(&revoked(account, &response.keys), DONE))
    })
}

fn revoked(account: &str, keys: &[RevokedKey]) -> String {
    let mut text = String::new();
    for RevokedKey {
        key,
        version,
        id_sha256,
        was_revoked,
    } in keys
    {
        text += &if *was_revoked {
            let detail = format!("{account}/{key} was already revoked (id SHA-256 {id_sha256}).");
            paragraph("unchanged: ", &detail)
        } else if id_sha256.is_empty() {
            let detail = format!(
                "{account}/{key}. No key was loaded: the first key that the broker reads from Vault under this name will be revoked, \
                 even a new one that you register."
            );
            paragraph("revoked: ", &detail)
        } else {
            let which = match version {
                0 => ", the key most recently loaded under this name".to_owned(),
                version => format!(" version {version}"),
            };
            let detail =
                format!("{account}/{key}{which}. It no longer signs (id SHA-256 {id_sha256}).");
            paragraph("revoked: ", &detail)
        };
    }
    text += &paragraph(
        "",
        "A revocation survives restarts, and covers the key under any name and version in Vault. Requests already sent run to completion.",
    );
    text += &paragraph(
        "next: 1. ",
        "Delete each revoked key on KuCoin's API Management page: until then, anybody who has it can use it without this broker.",
    );
    text += &paragraph(
        "      2. ",
        "Check the open orders on KuCoin's site: without a key the broker cannot cancel them.",
    );
    let register = keys.iter().map(|key| {
        let key_name = &key.key;
        if key.id_sha256.is_empty() {
            // Under the old name, the new key would be the first one, which is revoked.
            return format!(
                "`credbroker keys register {account} --key NAME` (first replace {key_name} with a new NAME in the rules)"
            );
        }
        format!("`credbroker keys register {account} --key {key_name}`")
    });
    let register = format!(
        "Create a new key under API Management (with a new id) and register it: {}.",
        register.collect::<Vec<_>>().join(", ")
    );
    text += &paragraph("      3. ", &register);
    text + &paragraph("undo: ", "not possible; register a new key to trade again.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_fits_a_terminal_and_names_the_next_step() {
        let key = |id_sha256: &str, was_revoked| RevokedKey {
            key: "y".repeat(32),
            version: 18,
            id_sha256: id_sha256.to_owned(),
            was_revoked,
        };
        let account = "x".repeat(32);
        let outputs = [
            (
                revoked(&account, &[key(&"a".repeat(64), false)]),
                "Delete each revoked key on KuCoin's",
            ),
            (revoked(&account, &[key("", false)]), "No key was loaded"),
            (
                revoked(
                    &account,
                    &[RevokedKey {
                        version: 0,
                        ..key(&"a".repeat(64), false)
                    }],
                ),
                ", the key most recently loaded under this name. It no longer signs",
            ),
            (
                revoked(&account, &[key(&"a".repeat(64), true)]),
                "was already revoked",
            ),
        ];
        for (text, expected) in outputs {
            assert!(
                text.split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" ")
                    .contains(expected),
                "{text}"
            );
            let fits = |line: &str| line.chars().count() <= 80;
            assert!(text.lines().all(fits), "{text}");
        }
    }
}
