//! `credbroker keys rollback`: the broker uses a previous version again and holds it.
//!
//! The old key is not written as a new version: the admin cannot read a key back, and the broker cannot write one.
//! Instead, the key's metadata in Vault names the version to use.

use std::path::PathBuf;

use clap::Args;

use super::common::{VAULT, pick, retired, shown};
use crate::base::ids::{AccountId, KeyName};
use crate::cli::admin::{ADMIN, Admin, AdminFile, Failure, block_on};
use crate::cli::text::paragraph;
use crate::cli::{DONE, printable, show};
use crate::proto::KeyState;
use crate::vault::{Metadata, Notes, Vault};

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
    step.note(&notes).await?;
    let state = broker
        .refresh(account, &key)
        .await
        .map_err(|failure| step.unknown(failure))?;
    if state.version == version {
        return Ok(step.show_done(hold.is_some(), &before, &state));
    }
    // A restarted broker must not use a version that this one does not use.
    step.note(&Notes::as_before(&found)).await?;
    // Makes the key's status show the restored metadata.
    let _ = broker.refresh(account, &key).await;
    let used = match state.version {
        0 => "No key is in use".to_owned(),
        used => format!("Version {used} stays in use"),
    };
    Err(Failure::new(
        format!(
            "the broker does not use version {version} of {account}/{key}: {}. {used}; the key's metadata in Vault was restored",
            state.reasons.join("; ")
        ),
        pick_another(account, &key),
    ))
}

/// The fix where the requested version cannot be used.
fn pick_another(account: &AccountId, key: &KeyName) -> String {
    format!(
        "pass an existing version with --to, or register another key with `credbroker keys register {account} --key {key}`"
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
    async fn note(&self, notes: &Notes) -> Result<(), Failure> {
        let written = self.vault.note(self.account, self.key, notes).await;
        written.map(drop).map_err(|error| {
            Failure::new(
                format!(
                    "cannot update use_version in the metadata of {}/{} in Vault: {error}",
                    self.account, self.key
                ),
                VAULT,
            )
        })
    }

    fn unknown(&self, failure: Failure) -> Failure {
        let Failure::Failed { cause, fix } = failure else {
            return failure;
        };
        let cause = format!(
            "Vault's metadata now selects version {} of {}/{}, and brokers use it within vault.poll_s; cannot check whether \
             this broker uses it yet: {cause}",
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
                "credbroker keys rollback {account} --key {key} --newest, or register another key. Until then, a version written \
                 to Vault by hand is used only if KuCoin rejects version {version}."
            );
            text += &paragraph("undo: ", &undo);
        }
        show(&text, DONE)
    }
}
