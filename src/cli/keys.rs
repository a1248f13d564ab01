//! `credbroker keys`: the keys of a running broker, listed and tested; the other commands have files of their own.

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
    /// Shows every key that the rules name, and how it is.
    ///
    /// Exit code 0: shown; 1: the broker was not reached, or refused; 2: the command line or admin.toml is wrong.
    #[command(
        after_long_help = "Status:\n  active       in memory, and the exchange accepts it\n  untested     in memory, and not tested yet\n  \
                           degraded, expiring, at-risk\n               works, and will not for long unless somebody acts\n  \
                           frozen       signs cancels and reads only\n  refused, revoked, unavailable\n               does not work\n\n\
                           Examples:\n  credbroker keys list\n  credbroker keys list --json | jq -r .status\n\n\
                           With --json, one object a line, with the fields of KeyState in admin.proto."
    )]
    List {
        /// How to reach the broker.
        #[arg(long, default_value = ADMIN)]
        admin: PathBuf,
        /// Writes a JSON object a line, for machines.
        #[arg(long)]
        json: bool,
    },
    /// Tests a key, writes it to Vault and puts it to use; or says what is wrong with it, and stores nothing.
    ///
    /// Key, secret and passphrase are asked for, or read from stdin: one in each line, or as a JSON object. The running
    /// broker tests them from its egress address before anything is stored. Exit code 0: in use; 1: refused or failed;
    /// 2: the command line or admin.toml is wrong.
    #[command(
        after_long_help = "Examples:\n  credbroker keys register main\n  credbroker keys register main --scope futures --try-order\n  \
                           credbroker keys register main < key.json  # api_key, api_secret, passphrase"
    )]
    Register(register::Options),
    /// Kills a key, or all keys of an account, at once and for good: only another key lifts it. Vault is not needed.
    ///
    /// Exit code 0: done; 1: the broker was not reached, or refused, or it is not on disk; 2: usage or admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker keys revoke main --key main\n  credbroker keys revoke main --yes\n\nWithout --key, \
                           confirm on a terminal or pass --yes in scripts.\n\nThe broker cancels orders with \
                           the same keys: to cancel them, run `credbroker halt ACCOUNT --cancel-all` first."
    )]
    Revoke(stop::Which),
    /// Goes back to the version before, or to another one; --newest undoes that.
    ///
    /// Exit code 0: in use; 1: refused or failed; 2: the command line or admin.toml is wrong.
    #[command(
        after_long_help = "Examples:\n  credbroker keys rollback main\n  credbroker keys rollback main --to 3\n  \
                           credbroker keys rollback main --newest"
    )]
    Rollback(rollback::Options),
    /// Puts another key in the place of one that is there, as `register` does; the one before serves until the new one has
    /// proven itself.
    ///
    /// Exit code 0: in use; 1: refused or failed, and the previous one stays in use; 2: the command line or admin.toml is wrong.
    #[command(
        after_long_help = "Examples:\n  credbroker keys rotate main\n  credbroker keys rotate main --key futures < key.json\n\n\
                           Delete the old key on KuCoin's page once the bots go on well."
    )]
    Rotate(register::Options),
    /// Tests the key that a running broker has in memory.
    ///
    /// Exit code 0: the exchange accepts it; 1: it is refused, or could not be tested; 2: the command line or admin.toml is
    /// wrong.
    #[command(
        after_long_help = "Examples:\n  credbroker keys test main\n  credbroker keys test main --key futures --try-order"
    )]
    Test {
        /// Account, as the rules name it.
        account: AccountId,
        /// Name of the key, where the account has several.
        #[arg(long)]
        key: Option<KeyName>,
        /// Has an order validated too, by the exchange's test endpoint, in each scope that has one; none is placed.
        #[arg(long)]
        try_order: bool,
        /// How to reach the broker.
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

/// What to do where the exchange did not say whether a key is good.
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
    let told = report(Style::of_stdout(), &account, &test, now_ms);
    if show(&told, DONE) != DONE {
        return Ok(FAILED);
    }
    if is_refused(&test) {
        let what = "the key must not be used like this: see `refused` above";
        return Err(Failure::new(what, "apply the `fix:` above"));
    }
    if test.is_unclear {
        let what = "KuCoin has not said whether the key is good: see `failed` above";
        return Err(Failure::new(what, UNCLEAR));
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

/// Each key with its status, and beside it what else is to be known.
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
        let frozen = "risk-increasing requests are rejected; cancels and reads still work.";
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

/// What is known about a key: at least what it serves.
fn facts(key: &KeyState, now_ms: i64) -> Vec<String> {
    let mut facts = vec![format!("serves {}", scopes_of(key).join(", "))];
    if !key.permissions.is_empty() {
        facts.push(format!("permissions {}", key.permissions.join(", ")));
    }
    if let Some(is_whitelisted) = key.is_whitelisted {
        let not = if is_whitelisted { "" } else { "not " };
        facts.push(format!("our address is {not}on its whitelist"));
    }
    let times = [("used", key.used_at_ms), ("tested", key.tested_at_ms)];
    let times: Vec<_> = times
        .iter()
        .filter(|(_, at_ms)| *at_ms != 0)
        .map(|(what, at_ms)| format!("{what} {}", ago(now_ms - at_ms)))
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
    fn a_table_fits_a_terminal_and_shows_what_is_known() {
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
main/main   degraded     3        serves spot-margin, futures, unified
                                  permissions General, Spot
                                  our address is not on its whitelist
                                  used 5 s ago, tested 15 min ago
                                  a newer version is not used: \\u{1b}[2Jthe
                                  secret has no field `passphrase`, which every
                                  key has
other/main  unavailable  -        serves spot-margin
";
        assert_eq!(table, expected);
    }
}
