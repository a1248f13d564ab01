//! `credbroker keys rollback`: the version before serves again, and on from there.
//!
//! Nobody can copy it: the admin cannot read a key back, and the broker cannot write one. So the admin notes beside the
//! key which version is to be used.

use std::path::PathBuf;

use clap::Args;

use super::common::{VAULT, ended, pick, shown};
use crate::base::ids::{AccountId, KeyName};
use crate::cli::admin::{ADMIN, Admin, AdminFile, Failure, block_on};
use crate::cli::text::paragraph;
use crate::cli::{DONE, printable, show};
use crate::proto::KeyState;
use crate::vault::{Metadata, Notes, Vault};

#[derive(Args, Debug)]
pub(in crate::cli) struct Options {
    /// Account, as the rules name it.
    account: AccountId,
    /// Name of the key, where the account has several.
    #[arg(long)]
    key: Option<KeyName>,
    /// The version to go to, as Vault counts. Without it: the one before the one to be used now.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "newest")]
    to: Option<u64>,
    /// Undoes a rollback: the newest version is used again.
    #[arg(long)]
    newest: bool,
    /// How to reach the broker and Vault.
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
        let what = format!("the broker returned an invalid key name: {error}");
        Failure::new(what, "use the `credbroker` of the broker's version")
    })?;
    let found = vault.metadata(account, &key).await.map_err(|error| {
        let what = format!(
            "cannot read the metadata of {account}/{key} in Vault: {error}; nothing was changed"
        );
        Failure::new(what, VAULT)
    })?;
    let change = wanted(options, &found).map_err(|what| {
        Failure::new(
            format!("{what}; nothing was changed"),
            pick_another(account, &key),
        )
    })?;
    let version = change.unwrap_or(found.current_version);
    let step = Step {
        account,
        key: &key,
        vault: &vault,
        version,
    };
    let notes = match change {
        Some(version) => Notes::hold(version, found.current_version),
        None => Notes::newest(),
    };
    step.note(&notes).await?;
    let state = broker
        .refresh(account, &key)
        .await
        .map_err(|failure| step.unknown(failure))?;
    if state.version == version {
        return Ok(step.tell(options, &before, &state));
    }
    // What a restart would use must not be a version that the broker does not take.
    step.note(&Notes::as_before(&found)).await?;
    // So that its status tells of what is wanted now.
    let _ = broker.refresh(account, &key).await;
    let used = match state.version {
        0 => "No key is in use".to_owned(),
        used => format!("Version {used} stays in use"),
    };
    Err(Failure::new(
        format!(
            "the broker does not take version {version} of {account}/{key}: {}. {used}, and what is noted in Vault is as it was.",
            state.reasons.join("; ")
        ),
        pick_another(account, &key),
    ))
}

/// What to do where the version that was meant cannot be used.
fn pick_another(account: &AccountId, key: &KeyName) -> String {
    format!(
        "name a version that is there with --to, or register another key with `credbroker keys register {account} --key {key}`"
    )
}

/// The version to note; none: that the newest one is to be used.
fn wanted(options: &Options, found: &Metadata) -> Result<Option<u64>, String> {
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
        // The newest one needs no note, and with one a later version would not be used.
        return usable(to).map(|to| Some(to).filter(|to| *to != newest));
    }
    let now = found.wanted()?;
    let before = found.before(now);
    let none = || format!("Vault has no version before version {now} that could be used");
    before.map(Some).ok_or_else(none)
}

/// One change of the version that is to be used.
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
                    "which version of {}/{} is to be used cannot be noted in Vault: {error}",
                    self.account, self.key
                ),
                VAULT,
            )
        })
    }

    fn unknown(&self, failure: Failure) -> Failure {
        let Failure::Undone { what, fix } = failure else {
            return failure;
        };
        let what = format!(
            "it is noted in Vault that version {} of {}/{} is to be used, and a broker follows within vault.poll_s; whether \
             this one has is not known: {what}",
            self.version, self.account, self.key
        );
        Failure::Undone { what, fix }
    }

    fn tell(&self, options: &Options, before: &KeyState, state: &KeyState) -> u8 {
        let Self {
            account,
            key,
            version,
            ..
        } = self;
        let told = format!(
            "{account}/{key}: version {version} is in use (id SHA-256 {}).{}",
            shown(&state.id_sha256),
            ended(before, *version)
        );
        let mut text = paragraph("", &told);
        for reason in &state.reasons {
            text += &paragraph("note: ", &printable(reason));
        }
        if !options.newest {
            let undo = format!(
                "credbroker keys rollback {account} --key {key} --newest, or register another key. Until then, a version written \
                 to Vault by hand is used only if KuCoin rejects this one."
            );
            text += &paragraph("undo: ", &undo);
        }
        show(&text, DONE)
    }
}
