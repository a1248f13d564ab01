//! `credbroker keys rollback`: the broker uses a previous version again and holds it.
//!
//! The old key is not written as a new version: the admin cannot read a key back, and the broker cannot write one.
//! Instead, the key's metadata in Vault names the version to use.

use std::path::PathBuf;

use clap::Args;

use super::common::{VAULT, joined, pick, retired, shown};
use crate::base::ids::{AccountId, KeyName};
use crate::cli::admin::{ADMIN, Admin, AdminFile, Failure, block_on};
use crate::cli::text::paragraph;
use crate::cli::{DONE, printable, show};
use crate::ops::key_health;
use crate::proto::KeyState;
use crate::vault::{Metadata, Notes, Vault, WriteError};

#[derive(Args, Debug)]
pub(in crate::cli) struct Options {
    /// Account, as named in the rules.
    account: AccountId,
    /// Name of the key; required if the account has several.
    #[arg(long)]
    key: Option<KeyName>,
    /// Version in Vault to return to. Default: the version before the current one.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "newest")]
    to: Option<u64>,
    /// Undo a rollback: use the newest version again.
    #[arg(long)]
    newest: bool,
    /// Path of admin.toml, which has the address of the broker and your login to Vault.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

pub(super) fn run(options: &Options) -> u8 {
    block_on(async || rollback(options).await)
}

async fn rollback(options: &Options) -> Result<u8, Failure> {
    let file = AdminFile::read(&options.admin)?;
    let vault = file.vault()?;
    let mut broker = Admin::connect(&file).await?;
    let account = &options.account;
    let before = pick(broker.keys().await?, account, options.key.as_ref(), &[])?;
    let key: KeyName = before.key.parse().map_err(|error| {
        let cause = format!("the broker returned an invalid key name: {error}");
        Failure::new(
            cause,
            "use a `credbroker` binary of the same version as the broker",
        )
    })?;
    let found = vault.metadata(account, &key).await.map_err(|error| {
        let cause = format!(
            "cannot read the metadata of {account}/{key} in Vault: {error}; nothing was changed"
        );
        Failure::new(cause, VAULT)
    })?;
    let hold = new_hold(options, &found).map_err(|cause| {
        Failure::new(
            format!("{cause}; nothing was changed"),
            pick_another(account, &key),
        )
    })?;
    let version = hold.unwrap_or(found.current_version);
    let step = Step {
        account,
        key: &key,
        vault: &vault,
        version,
    };
    let notes = match hold {
        Some(version) => Notes::hold(version, found.current_version),
        None => Notes::newest(),
    };
    step.note(&notes).await.map_err(|error| {
        let cause = format!(
            "cannot update use_version in the metadata of {account}/{key} in Vault: {error}"
        );
        match error {
            WriteError::Unclear(_) => Failure::new(cause, step.repeat(version)),
            WriteError::Refused(_) | WriteError::Stale { .. } | WriteError::Vault(_) => {
                Failure::new(format!("{cause}; nothing was changed"), VAULT)
            }
        }
    })?;
    let state = broker
        .refresh(account, &key)
        .await
        .map_err(|failure| step.unknown(failure))?;
    if state.version == version {
        return Ok(step.show_done(hold.is_some(), &before, &state));
    }
    let used = match state.version {
        0 => "No key is in use".to_owned(),
        used => format!("Version {used} stays in use"),
    };
    let refused = format!(
        "the broker did not switch to version {version} of {account}/{key}: {}. {used}",
        why_unused(&state, version)
    );
    // A restarted broker must not use a version that this one does not use.
    let restored = step.note(&Notes::as_before(&found)).await;
    restored.map_err(|error| {
        let cause = format!(
            "{refused}, but use_version in the key's metadata in Vault could not be restored and may still select version \
             {version}: {error}"
        );
        Failure::new(cause, step.repeat(state.version))
    })?;
    // Makes the key's status show the restored metadata.
    let _ = broker.refresh(account, &key).await;
    Err(Failure::new(
        format!("{refused}; the key's metadata in Vault is again as before this command"),
        pick_another(account, &key),
    ))
}

/// Why the broker does not use `version`, without what the command reports itself: that it selected this version, and which
/// version is in use.
fn why_unused(state: &KeyState, version: u64) -> String {
    let selects = key_health::selects(version);
    let using = key_health::using(state.version);
    let reasons = state.reasons.iter().map(String::as_str);
    let reasons = reasons.filter(|reason| !reason.starts_with(&selects));
    joined(reasons.map(|reason| reason.strip_prefix(&using).unwrap_or(reason)))
}

/// The fix where the requested version cannot be used.
fn pick_another(account: &AccountId, key: &KeyName) -> String {
    format!(
        "with --to, pass a different version that exists in Vault, or register another key with `credbroker keys register {account} --key {key}`"
    )
}

/// The version to hold; none: use the newest one.
fn new_hold(options: &Options, found: &Metadata) -> Result<Option<u64>, String> {
    let newest = found.current_version;
    let usable = |version| {
        if found.has(version) {
            Ok(version)
        } else {
            Err(format!(
                "Vault has no version {version}: it never existed, or it was deleted or destroyed"
            ))
        }
    };
    if options.newest {
        return usable(newest).map(|_| None);
    }
    if let Some(to) = options.to {
        // The newest version needs no hold, and a hold would keep the broker from using later ones.
        return usable(to).map(|to| Some(to).filter(|to| *to != newest));
    }
    let now = found.wanted()?;
    let before = found.before(now);
    let none = || format!("Vault has no usable version before version {now}");
    before.map(Some).ok_or_else(none)
}

/// A change of the version to use.
struct Step<'a> {
    account: &'a AccountId,
    key: &'a KeyName,
    vault: &'a Vault,
    version: u64,
}

impl Step<'_> {
    async fn note(&self, notes: &Notes) -> Result<(), WriteError> {
        let written = self.vault.note(self.account, self.key, notes).await;
        written.map(drop)
    }

    /// The fix where `use_version` in Vault is not certain: without `--to`, the repeated command could go back one version too
    /// far.
    fn repeat(&self, to: u64) -> String {
        let Self { account, key, .. } = self;
        if to == 0 {
            return pick_another(account, key);
        }
        format!(
            "check that Vault is running and unsealed, and check [vault] in admin.toml; then run \
             `credbroker keys rollback {account} --key {key} --to {to}`"
        )
    }

    fn unknown(&self, failure: Failure) -> Failure {
        let Failure::Failed { cause, fix } = failure else {
            return failure;
        };
        let cause = format!(
            "Vault's metadata now selects version {} of {}/{}, and brokers switch to it at their next poll (vault.poll_s) if \
             KuCoin accepts it; could not check whether this broker has already switched: {cause}",
            self.version, self.account, self.key
        );
        Failure::Failed { cause, fix }
    }

    fn show_done(&self, is_held: bool, before: &KeyState, state: &KeyState) -> u8 {
        let Self {
            account,
            key,
            version,
            ..
        } = self;
        let done = format!(
            "{account}/{key}: version {version} is in use (id SHA-256 {}).{}",
            shown(&state.id_sha256),
            retired(before, *version)
        );
        let mut text = paragraph("", &done);
        for reason in &state.reasons {
            text += &paragraph("note: ", &printable(reason));
        }
        if is_held {
            let undo = format!(
                "`credbroker keys rollback {account} --key {key} --newest`, or register another key. Until then, the broker holds \
                 version {version}: a new version written to Vault by hand is used only if KuCoin rejects version {version}."
            );
            text += &paragraph("undo: ", &undo);
        }
        show(&text, DONE)
    }
}
