//! `credbroker keys`: the keys of a running broker.

mod stop;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use serde_json::json;

use super::admin::{self, ADMIN};
use super::{DONE, show};
use crate::api::proto::{KeyState, ListKeysRequest, Scope};
use crate::clock::Clock;

/// The broker answers from memory.
const LIST_WITHIN: Duration = Duration::from_secs(10);

/// Columns of a terminal.
const WIDTH: usize = 80;

/// How far what belongs to a row stands in.
const INDENT: &str = "    ";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Refuses what adds risk on an account; cancels and reads go on.
    ///
    /// Exit code 0: done; 1: the broker was not reached, or refused, or it is not on disk; 2: usage or admin.toml.
    Freeze(stop::Whose),
    /// Shows every key that the rules name, and how it is.
    ///
    /// Exit code 0: shown; 1: the broker was not reached, or refused; 2: the command line or admin.toml is wrong.
    #[command(
        after_long_help = "Status:\n  connected, untested  in memory, and tested with the exchange or not\n  degraded, expiring, at-risk  \
                           works, and something will go wrong unless somebody acts\n  frozen, refused, revoked, unavailable  does not work\n\n\
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
    /// Kills a key, or all keys of an account, at once and for good: only another key lifts it. Vault is not needed.
    ///
    /// Exit code 0: done; 1: the broker was not reached, or refused, or it is not on disk; 2: usage or admin.toml.
    #[command(
        after_long_help = "The broker cancels orders with the same keys: where they shall go, `credbroker halt ACCOUNT --cancel-all` first."
    )]
    Revoke(stop::Which),
    /// Undoes freeze.
    ///
    /// Exit code 0: done; 1: the broker was not reached, or refused; 2: usage or admin.toml.
    Thaw(stop::Whose),
}

pub(super) fn run(command: &Command) -> u8 {
    match command {
        Command::Freeze(whose) => stop::freeze(whose),
        Command::List { admin, json } => list(admin, *json),
        Command::Revoke(which) => stop::revoke(which),
        Command::Thaw(whose) => stop::thaw(whose),
    }
}

fn list(admin: &Path, json: bool) -> u8 {
    admin::run(admin, async |mut admin| {
        let list = async |client: &mut admin::Client, request| client.list_keys(request).await;
        let keys = admin.ask(LIST_WITHIN, ListKeysRequest {}, list).await?.keys;
        let text = if json {
            keys.iter()
                .fold(String::new(), |text, key| text + &in_json(key) + "\n")
        } else {
            table(&keys, Clock::system().wall_ms())
        };
        Ok(show(&text, DONE))
    })
}

fn in_json(key: &KeyState) -> String {
    let time = |ms: i64| (ms != 0).then_some(ms);
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    json!({
        "account": key.account,
        "key": key.key,
        "scopes": scopes(key),
        "status": key.status,
        "reasons": key.reasons,
        "version": (key.version != 0).then_some(key.version),
        "permissions": key.permissions,
        "is_whitelisted": key.is_whitelisted,
        "used_at_ms": time(key.used_at_ms),
        "tested_at_ms": time(key.tested_at_ms),
        "uid": text(&key.uid),
        "expires_at_ms": time(key.expires_at_ms),
        "id_sha256": text(&key.id_sha256),
    })
    .to_string()
}

fn scopes(key: &KeyState) -> Vec<&'static str> {
    let word = |scope| match scope {
        Scope::Futures => "futures",
        Scope::SpotMargin => "spot-margin",
        Scope::Unified => "unified",
        Scope::Unspecified => "unknown",
    };
    key.scopes().map(word).collect()
}

/// Status, version, scopes and name of each key, and below each what else is to be known.
fn table(keys: &[KeyState], now_ms: i64) -> String {
    let mut lines = vec![format!("{:<11}  {:>7}  KEY", "STATUS", "VERSION")];
    for key in keys {
        let version = match key.version {
            0 => "-".to_owned(),
            version => version.to_string(),
        };
        let KeyState {
            account, key: name, ..
        } = key;
        lines.push(format!(
            "{:<11}  {version:>7}  {account}/{name}",
            key.status
        ));
        let mut below = vec![format!("serves {}", scopes(key).join(", "))];
        if !key.permissions.is_empty() {
            below.push(format!("permissions {}", key.permissions.join(", ")));
        }
        if let Some(is_whitelisted) = key.is_whitelisted {
            let not = if is_whitelisted { "" } else { "not " };
            below.push(format!("our address is {not}whitelisted"));
        }
        for (what, at_ms) in [("used", key.used_at_ms), ("tested", key.tested_at_ms)] {
            if at_ms != 0 {
                below.push(format!("{what} {}", ago(now_ms - at_ms)));
            }
        }
        lines.extend(wrapped(&below.join("; ")));
        lines.extend(key.reasons.iter().flat_map(|reason| wrapped(reason)));
    }
    lines.join("\n") + "\n"
}

fn ago(ms: i64) -> String {
    let s = ms.max(0) / 1000;
    match s {
        0..120 => format!("{s} s ago"),
        120..7200 => format!("{} min ago", s / 60),
        7200..172_800 => format!("{} h ago", s / 3600),
        _ => format!("{} days ago", s / 86_400),
    }
}

/// Lines that fit a terminal. What others wrote (Vault, the exchange) moves no cursor.
fn wrapped(text: &str) -> Vec<String> {
    let text: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(format!("{INDENT}{word}")),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_fits_a_terminal_and_shows_what_is_known() {
        let known = KeyState {
            account: "main".to_owned(),
            key: "main".to_owned(),
            scopes: vec![Scope::SpotMargin.into(), Scope::Futures.into(), Scope::Unified.into()],
            status: "degraded".to_owned(),
            reasons: vec!["a newer version is not used: \u{1b}[2Jthe secret has no field `passphrase`, which every key has".to_owned()],
            version: 3,
            permissions: vec!["General".to_owned(), "Spot".to_owned()],
            is_whitelisted: Some(false),
            used_at_ms: 1_000_000,
            tested_at_ms: 100_000,
            ..KeyState::default()
        };
        let unknown = KeyState {
            account: "x".repeat(32),
            key: "y".repeat(25),
            status: "unavailable".to_owned(),
            ..KeyState::default()
        };
        let table = table(&[known, unknown], 1_005_000);
        let expected = "STATUS       VERSION  KEY\n\
                        degraded           3  main/main\n    \
                            serves spot-margin, futures, unified; permissions General, Spot; our address\n    \
                            is not whitelisted; used 5 s ago; tested 15 min ago\n    \
                            a newer version is not used: [2Jthe secret has no field `passphrase`, which\n    \
                            every key has\n";
        assert!(table.starts_with(expected), "{table}");
        assert!(
            table.lines().all(|line| line.chars().count() <= WIDTH),
            "{table}"
        );
    }

    #[test]
    fn ages_are_told_in_the_unit_that_fits() {
        let cases = [
            (-5, "0 s"),
            (119_999, "119 s"),
            (120_000, "2 min"),
            (7_200_000, "2 h"),
            (172_800_000, "2 days"),
        ];
        for (ms, expected) in cases {
            assert_eq!(ago(ms), format!("{expected} ago"));
        }
    }
}
