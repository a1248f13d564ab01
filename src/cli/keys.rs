//! `credbroker keys`: `list` and `test`; each other subcommand has its own file.

pub(super) mod common;
mod register;
mod rollback;
mod stop;

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use common::scopes_of;

use super::admin::{self, ADMIN, Admin, Failure};
use super::report::{is_refused, report};
use super::text::{Cell, Style, ago, paragraph};
use super::{DONE, FAILED, printable, show};
use crate::base::diagnosis::Severity;
use crate::base::ids::{AccountId, KeyName};
use crate::base::text::clean_json;
use crate::clock::Clock;
use crate::proto::{KeyState, KeyStatus, TestKeyRequest};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List keys and their health.
    ///
    /// Exit code 0: listed; 1: broker unreachable or call refused; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Status:\n  active       loaded, and the exchange accepts it\n  untested     loaded, and not tested yet\n  \
                           degraded, expiring, at-risk\n               works, but needs attention\n  \
                           frozen       signs cancels and reads only\n  refused, revoked, unavailable\n               does not work\n\n\
                           Examples:\n  credbroker keys list\n  credbroker keys list --json | jq -r .status\n\n\
                           With --json: one object per line, with the fields of KeyState in admin.proto."
    )]
    List {
        /// Path of admin.toml, which has the address of the broker.
        #[arg(long, default_value = ADMIN)]
        admin: PathBuf,
        /// Print one JSON object per line.
        #[arg(long)]
        json: bool,
    },
    /// Test a key, write it to Vault and start using it; a key that fails its test is not stored.
    ///
    /// Registers the first key, or replaces the existing one. Prompts for key, secret and passphrase, or reads them from
    /// stdin: one per line in this order, or as a JSON object with `api_key`, `api_secret` and `passphrase`. The running
    /// broker tests them from its egress address before anything is stored. Exit code 0: in use; 1: rejected or failed; 2:
    /// usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker keys register main\n  credbroker keys register main --scope futures --try-order\n  \
                           credbroker keys register main < key.json"
    )]
    Register(register::Options),
    /// Revoke a key, or all keys of an account, immediately and permanently.
    ///
    /// Revokes the key in use, not the keys in other versions in Vault. A revoked key stays revoked, even if it is
    /// registered again: create another key at KuCoin and register that one. Works without Vault. Exit code 0: revoked; 1:
    /// broker unreachable, call refused, or not written to disk; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker keys revoke main --key main\n  credbroker keys revoke main --yes\n\nWithout --key, \
                           confirm on a terminal or pass --yes in scripts.\n\nA revoked key can no longer cancel \
                           orders: run `credbroker halt ACCOUNT --cancel-all` before you revoke keys."
    )]
    Revoke(stop::Which),
    /// Return to the previous version of a key, or to the one given by --to; --newest undoes that.
    ///
    /// Holds the version until --newest or the next registration. A second rollback without --to goes back one more
    /// version. Exit code 0: in use; 1: rejected or failed; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker keys rollback main\n  credbroker keys rollback main --to 3\n  \
                           credbroker keys rollback main --newest"
    )]
    Rollback(rollback::Options),
    /// Replace a key with a new one, as `register` does; the previous key signs until the new one has passed its tests.
    ///
    /// Unlike `register`, fails if Vault has no key to replace. Exit code 0: the new key is in use; 1: failed; the message
    /// says which key is in use, or how to find out; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker keys rotate main\n  credbroker keys rotate main --key futures < key.json\n\n\
                           Delete the old key on KuCoin's API Management page once your bots work with the new one."
    )]
    Rotate(register::Options),
    /// Test a loaded key.
    ///
    /// Exit code 0: the exchange accepts the key; 1: the key was rejected or could not be tested; 2: usage error or invalid
    /// admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker keys test main\n  credbroker keys test main --key futures --try-order"
    )]
    Test {
        /// Account, as named in the rules.
        account: AccountId,
        /// Name of the key; required if the account has several.
        #[arg(long)]
        key: Option<KeyName>,
        /// Also validate an order with the exchange's test endpoint, in each scope that has one; no order is placed.
        #[arg(long)]
        try_order: bool,
        /// Path of admin.toml, which has the address of the broker.
        #[arg(long, default_value = ADMIN)]
        admin: PathBuf,
    },
}

pub(super) fn run(command: &Command) -> u8 {
    match command {
        Command::List { admin: file, json } => {
            admin::run(file, async |admin| list(admin, *json).await)
        }
        Command::Register(options) => register::run(register::Command::Register, options),
        Command::Revoke(which) => stop::revoke(which),
        Command::Rollback(options) => rollback::run(options),
        Command::Rotate(options) => register::run(register::Command::Rotate, options),
        Command::Test {
            account,
            key,
            try_order,
            admin: file,
        } => {
            let request = TestKeyRequest {
                account: account.to_string(),
                key: key.as_ref().map(ToString::to_string).unwrap_or_default(),
                candidate: None,
                try_order: *try_order,
            };
            admin::run(file, async |admin| test(admin, request).await)
        }
    }
}

/// The fix where the test of a key was inconclusive.
const UNCLEAR: &str = "check the connection to KuCoin with `credbroker doctor`, then re-run the command; a test changes nothing";

async fn list(mut admin: Admin, json: bool) -> Result<u8, Failure> {
    let keys = admin.keys().await?;
    let text = if json {
        keys.iter()
            .fold(String::new(), |text, key| text + &in_json(key) + "\n")
    } else {
        table(Style::of_stdout(), &keys, Clock::system().wall_ms())
    };
    Ok(show(&text, DONE))
}

async fn test(mut admin: Admin, request: TestKeyRequest) -> Result<u8, Failure> {
    let account = request.account.clone();
    let test = admin.test(request).await?;
    let now_ms = Clock::system().wall_ms();
    let shown = report(Style::of_stdout(), &account, &test, now_ms);
    if show(&shown, DONE) != DONE {
        return Ok(FAILED);
    }
    if is_refused(&test) {
        let cause = "the key failed its test; see `refused` above";
        return Err(Failure::new(cause, "apply each `fix:` above"));
    }
    if test.is_inconclusive {
        let cause = "the test was inconclusive: KuCoin neither accepted nor rejected the key; see `failed` above";
        return Err(Failure::new(cause, UNCLEAR));
    }
    let good = format!(
        "{account}/{}: KuCoin accepts this key's signatures.",
        test.key
    );
    Ok(show(&format!("\n{}\n", printable(&good)), DONE))
}

fn in_json(key: &KeyState) -> String {
    let time = |ms: i64| (ms != 0).then_some(ms);
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let object = json!({
        "account": key.account,
        "key": key.key,
        "scopes": scopes_of(key),
        "status": key.status().word(),
        "reasons": key.reasons,
        "version": (key.version != 0).then_some(key.version),
        "permissions": key.permissions,
        "is_whitelisted": key.is_whitelisted,
        "used_at_ms": time(key.used_at_ms),
        "tested_at_ms": time(key.tested_at_ms),
        "uid": text(&key.uid),
        "expires_at_ms": time(key.expires_at_ms),
        "id_sha256": text(&key.id_sha256),
    });
    clean_json(&object.to_string()).into_owned()
}

/// One row per key: status, version and details.
fn table(style: Style, keys: &[KeyState], now_ms: i64) -> String {
    let mut rows = vec![["KEY", "STATUS", "VERSION", ""].map(Cell::from).to_vec()];
    for key in keys {
        let version = match key.version {
            0 => "-".to_owned(),
            version => version.to_string(),
        };
        let name = format!("{}/{}", key.account, key.key);
        let mut row = vec![
            printable(&name).into(),
            Cell::of(severity(key.status()), key.status().word()),
            version.into(),
        ];
        for line in facts(key, now_ms).iter().chain(&key.reasons) {
            row.push(printable(line).into());
            rows.push(row);
            row = vec![Cell::default(); 3];
        }
    }
    let mut text = style.table(&rows);
    if keys.iter().any(|key| key.status() == KeyStatus::Frozen) {
        let frozen = "risk-increasing requests are refused; cancels and reads still work.";
        text += &paragraph("frozen: ", frozen);
    }
    text
}

fn severity(status: KeyStatus) -> Severity {
    match status {
        KeyStatus::Active => Severity::Ok,
        KeyStatus::Refused | KeyStatus::Revoked | KeyStatus::Unavailable => Severity::Failed,
        _ => Severity::Warning,
    }
}

/// Details of a key: scopes, permissions, whitelist, last use and last test.
fn facts(key: &KeyState, now_ms: i64) -> Vec<String> {
    let mut facts = vec![format!("used for {}", scopes_of(key).join(", "))];
    if !key.permissions.is_empty() {
        facts.push(format!("permissions {}", key.permissions.join(", ")));
    }
    if let Some(is_whitelisted) = key.is_whitelisted {
        let not = if is_whitelisted { "" } else { "not " };
        facts.push(format!("egress address {not}whitelisted for this key"));
    }
    let times = [("used", key.used_at_ms), ("tested", key.tested_at_ms)];
    let times: Vec<_> = times
        .iter()
        .filter(|(_, at_ms)| *at_ms != 0)
        .map(|(event, at_ms)| format!("{event} {}", ago(now_ms - at_ms)))
        .collect();
    if !times.is_empty() {
        facts.push(times.join(", "));
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Scope;

    #[test]
    fn table_of_keys_fits_a_terminal_and_shows_all_details() {
        let known = KeyState {
            account: "main".to_owned(),
            key: "main".to_owned(),
            scopes: vec![Scope::SpotMargin.into(), Scope::Futures.into(), Scope::Unified.into()],
            status: KeyStatus::Degraded.into(),
            reasons: vec!["a newer version is not used: \u{1b}[2Jthe secret has no field `passphrase`, which every key has".to_owned()],
            version: 3,
            permissions: vec!["General".to_owned(), "Spot".to_owned()],
            is_whitelisted: Some(false),
            used_at_ms: 1_000_000,
            tested_at_ms: 100_000,
            ..KeyState::default()
        };
        let unknown = KeyState {
            account: "other".to_owned(),
            key: "main".to_owned(),
            scopes: vec![Scope::SpotMargin.into()],
            status: KeyStatus::Unavailable.into(),
            ..KeyState::default()
        };
        let table = table(Style::plain(), &[known, unknown], 1_005_000);
        let expected = "\
KEY         STATUS       VERSION
main/main   degraded     3        used for spot-margin, futures, unified
                                  permissions General, Spot
                                  egress address not whitelisted for this key
                                  used 5 s ago, tested 15 min ago
                                  a newer version is not used: \\u{1b}[2Jthe
                                  secret has no field `passphrase`, which every
                                  key has
other/main  unavailable  -        used for spot-margin
";
        assert_eq!(table, expected);
    }
}
