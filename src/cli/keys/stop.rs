//! `credbroker keys revoke`: takes effect at once, whatever Vault does.

use std::path::PathBuf;

use clap::Args;

use crate::cli::admin::{self, ADMIN, Client};
use crate::cli::confirm::confirm;
use crate::cli::text::paragraph;
use crate::cli::{DECIDE_WITHIN, DONE, show};
use crate::proto::{RevokeKeyRequest, RevokedKey};

#[derive(Args, Debug)]
pub(in crate::cli) struct Which {
    /// The account, as the rules file names it.
    account: String,
    /// How to reach the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
    /// One key of the account; all of them without it.
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
    let what = format!(
        "permanently revokes every key of account {account}: only a key with another id can trade there again. To revoke a single key, use \
         --key NAME"
    );
    if key.is_none()
        && let Err(code) = confirm(&what, *yes)
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
            let what =
                format!("{account}/{key} was already revoked. SHA-256 of its id: {id_sha256}");
            paragraph("unchanged: ", &what)
        } else if id_sha256.is_empty() {
            let what = format!(
                "{account}/{key}. None was in memory: the first one that Vault shows there is dead, be it one that is registered \
                 after this."
            );
            paragraph("revoked: ", &what)
        } else {
            let what = format!(
                "{account}/{key} version {version}, in force now: it no longer signs. SHA-256 of its id: {id_sha256}"
            );
            paragraph("revoked: ", &what)
        };
    }
    text += &paragraph(
        "",
        "It stays revoked after a restart, whatever Vault holds and under any name. Requests already sent run to their end.",
    );
    text += &paragraph(
        "next: 1. ",
        "Delete the key on KuCoin's page under API Management: until then anybody who has it can use it without this broker.",
    );
    text += &paragraph(
        "      2. ",
        "Check the open orders there: without a key the broker cannot cancel them.",
    );
    let register = keys
        .iter()
        .map(|key| format!("`credbroker keys register {account} --key {}`", key.key));
    let register = format!(
        "Create a new key there (with a new id) and register it: {}.",
        register.collect::<Vec<_>>().join(", ")
    );
    text += &paragraph("      3. ", &register);
    text + &paragraph(
        "undo: ",
        "none, permanent; register a new key to trade again.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_fits_a_terminal_and_names_the_next_step() {
        let key = |id_sha256: &str, was_revoked| RevokedKey {
            key: "y".repeat(32),
            version: 18,
            id_sha256: id_sha256.to_owned(),
            was_revoked,
        };
        let account = "x".repeat(32);
        let said = [
            (
                revoked(&account, &[key(&"a".repeat(64), false)]),
                "Delete the key on KuCoin's page",
            ),
            (revoked(&account, &[key("", false)]), "None was in memory"),
            (
                revoked(&account, &[key(&"a".repeat(64), true)]),
                "was already revoked",
            ),
        ];
        for (text, expected) in said {
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
