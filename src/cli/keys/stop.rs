//! `credbroker keys revoke`, `freeze` and `thaw`: what takes effect at once, whatever Vault does.

use std::path::PathBuf;

use clap::Args;

use crate::api::proto::{
    FreezeAccountRequest, RevokeKeyRequest, RevokedKey, ThawAccountRequest, ThawAccountResponse,
};
use crate::cli::admin::{self, ADMIN, Client};
use crate::cli::confirm::confirm;
use crate::cli::text::paragraph;
use crate::cli::{DECIDE_WITHIN, DONE, show};

#[derive(Args, Debug)]
pub(in crate::cli) struct Whose {
    /// The account, as the rules file names it.
    account: String,
    /// How to reach the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

#[derive(Args, Debug)]
pub(in crate::cli) struct Which {
    #[command(flatten)]
    whose: Whose,
    /// One key of the account; all of them without it.
    #[arg(long)]
    key: Option<String>,
    /// Skip the confirmation when --key is missing.
    #[arg(long)]
    yes: bool,
}

pub(super) fn freeze(whose: &Whose) -> u8 {
    admin::run(&whose.admin, async |mut admin| {
        let account = &whose.account;
        let request = FreezeAccountRequest {
            account: account.clone(),
        };
        let freeze = async |client: &mut Client, request| client.freeze_account(request).await;
        let response = admin.ask(DECIDE_WITHIN, request, freeze).await?;
        Ok(show(&frozen(account, response.was_frozen), DONE))
    })
}

fn frozen(account: &str, was_frozen: bool) -> String {
    let since = if was_frozen {
        "as it was already"
    } else {
        "in force now"
    };
    let mut text = paragraph(
        "frozen: ",
        &format!(
            "account {account}, {since}. What adds risk is refused (ACCOUNT_FROZEN), also after a restart of the broker; cancels and \
             reads go on."
        ),
    );
    let next = format!(
        "orders that were open are open still: its bots can cancel them, and so can `credbroker halt {account} --cancel-all`"
    );
    text += &paragraph("next: ", &next);
    text + &paragraph("undo: ", &format!("credbroker keys thaw {account}"))
}

pub(super) fn thaw(whose: &Whose) -> u8 {
    admin::run(&whose.admin, async |mut admin| {
        let request = ThawAccountRequest {
            account: whose.account.clone(),
        };
        let thaw = async |client: &mut Client, request| client.thaw_account(request).await;
        let response = admin.ask(DECIDE_WITHIN, request, thaw).await?;
        Ok(show(&thawed(&whose.account, response), DONE))
    })
}

fn thawed(account: &str, response: ThawAccountResponse) -> String {
    let mut text = match (response.was_frozen, response.is_halted) {
        (true, false) => {
            let what =
                format!("account {account}, in force now. What adds risk goes through again.");
            paragraph("thawed: ", &what)
        }
        (true, true) => paragraph("thawed: ", &format!("account {account}.")),
        (false, _) => paragraph("unchanged: ", &format!("account {account} was not frozen.")),
    };
    if response.is_halted {
        let what = format!(
            "it is halted, and refuses what adds risk still: `credbroker resume {account}`, or `credbroker resume --all` where all \
             accounts were halted"
        );
        text += &paragraph("but: ", &what);
    }
    text
}

pub(super) fn revoke(which: &Which) -> u8 {
    let Which { whose, key, yes } = which;
    let what = format!(
        "permanently revokes every key of account {}: only a key with another id can trade there again. To revoke a single key, use \
         --key NAME",
        whose.account
    );
    if key.is_none()
        && let Err(code) = confirm(&what, *yes)
    {
        return code;
    }
    admin::run(&whose.admin, async |mut admin| {
        let request = RevokeKeyRequest {
            account: whose.account.clone(),
            key: key.clone().unwrap_or_default(),
        };
        let revoke = async |client: &mut Client, request| client.revoke_key(request).await;
        let response = admin.ask(DECIDE_WITHIN, request, revoke).await?;
        Ok(show(&revoked(&whose.account, &response.keys), DONE))
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
                format!("{account}/{key} was revoked already. SHA-256 of its id: {id_sha256}");
            paragraph("unchanged: ", &what)
        } else if id_sha256.is_empty() {
            let what = format!(
                "{account}/{key}. None was in memory: the first one that Vault shows there is dead, be it one that is registered \
                 after this."
            );
            paragraph("revoked: ", &what)
        } else {
            let what = format!(
                "{account}/{key} version {version}, in force now: it signs nothing more. SHA-256 of its id: {id_sha256}"
            );
            paragraph("revoked: ", &what)
        };
    }
    text += &paragraph(
        "",
        "It stays dead after a restart of the broker, whatever Vault holds and under every name. What has left already ends.",
    );
    text += &paragraph(
        "next: 1. ",
        "Delete the key on KuCoin's page under API Management: until then whoever has it can use it past this broker.",
    );
    text += &paragraph(
        "      2. ",
        "Look at the open orders there: without a key the broker cannot cancel them.",
    );
    let register = keys
        .iter()
        .map(|key| format!("`credbroker keys register {account} --key {}`", key.key));
    let register = format!(
        "Make another key there and register it, a key with another id: {}.",
        register.collect::<Vec<_>>().join(", ")
    );
    text += &paragraph("      3. ", &register);
    text + &paragraph("undo: ", "none; only another key lifts it.")
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
        let response = |was_frozen, is_halted| ThawAccountResponse {
            was_frozen,
            is_halted,
        };
        let said = [
            (
                revoked(&account, &[key(&"a".repeat(64), false)]),
                "Delete the key on KuCoin's page",
            ),
            (revoked(&account, &[key("", false)]), "None was in memory"),
            (
                revoked(&account, &[key(&"a".repeat(64), true)]),
                "was revoked already",
            ),
            (frozen(&account, false), "undo: credbroker keys thaw"),
            (frozen(&account, true), "as it was already"),
            (
                thawed(&account, response(true, false)),
                "goes through again",
            ),
            (thawed(&account, response(true, true)), "but: it is halted"),
            (thawed(&account, response(false, false)), "was not frozen"),
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
