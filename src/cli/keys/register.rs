//! `credbroker keys register` and `keys rotate`: tests a key, writes it to Vault, and has the broker use it.
//!
//! Vault is written in two steps: first the version itself, with check-and-set on the version that was read before, then
//! the metadata that describe it. The previous key signs until KuCoin accepts the new one's signatures. If the response
//! to the first step is lost, the broker reports which key is in Vault.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::time::sleep;

use super::common::{VAULT, joined, pick, retired, scopes_of, shown};
use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, AdminId, KeyName};
use crate::base::secret::{KeyValues, PartnerKey};
use crate::cli::NEW_MOUNT;
use crate::cli::admin::{ADMIN, Admin, AdminFile, Failure, block_on};
use crate::cli::report::{is_refused, report};
use crate::cli::secrets::{self, InputError};
use crate::cli::text::{Style, paragraph};
use crate::cli::{DONE, printable, say, show};
use crate::clock::Clock;
use crate::kucoin::{KeyVersion, Scope, key_info};
use crate::process::{Signals, harden};
use crate::proto::{
    Candidate, Finding, KeyInfo, KeyState, KeyStatus, TestKeyRequest, TestKeyResponse,
};
use crate::vault::{
    Metadata, Notes, Registration, StoredFacts, StoredState, Vault, VaultError, WriteError,
    unknown_state,
};

/// How often the broker refreshes the key until it uses a new version; each refresh tests the version.
const REFRESHES: usize = 3;

/// The wait between two refreshes.
const REFRESH_PAUSE: Duration = Duration::from_secs(2);

#[derive(Args, Debug)]
pub(in crate::cli) struct Options {
    /// Account, as named in the rules.
    account: AccountId,
    /// Scope that the key is used for; may be repeated. Default: the scopes in the rules.
    #[arg(long = "scope", value_parser = crate::cli::scope)]
    scopes: Vec<Scope>,
    /// Name of the key; required if the account has several.
    #[arg(long)]
    key: Option<KeyName>,
    /// Also validate an order with the exchange's test endpoint, in each scope that has one; no order is placed.
    #[arg(long)]
    try_order: bool,
    /// Accept a key of a different KuCoin account than the previous key's.
    #[arg(long)]
    other_account: bool,
    /// Enable the key if it is disabled in Vault.
    #[arg(long)]
    enable: bool,
    /// Path of admin.toml, which has the address of the broker and your login to Vault.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

/// Which of the two commands it is.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Command {
    /// The first key, or a replacement.
    Register,
    /// A replacement for an existing key.
    Rotate,
}

pub(super) fn run(command: Command, options: &Options) -> u8 {
    // Before the process holds a secret or starts a second thread.
    harden();
    block_on(async || {
        let mut signals = Signals::of_a_command().map_err(|error| {
            Failure::new(format!("cannot install signal handlers: {error}"), RERUN)
        })?;
        tokio::select! {
            // First: the prompt handles the signal, too, and its error is more specific.
            biased;
            result = register(command, options) => result,
            _ = signals.next() => Err(Failure::new(
                "interrupted",
                "re-run the command; it reports what Vault holds, and continues",
            )),
        }
    })
}

async fn register(command: Command, options: &Options) -> Result<u8, Failure> {
    let file = AdminFile::read(&options.admin)?;
    let (vault, admin) = (file.vault()?, file.name()?);
    let mut broker = Admin::connect(&file).await?;
    let keys = broker.keys().await?;
    let in_rules = keys.iter().map(|key| key.account.clone()).collect();
    let state = pick(
        keys,
        &options.account,
        options.key.as_ref(),
        &options.scopes,
    )?;
    let key = state.key.parse().map_err(|error| {
        let cause = format!("the broker returned an invalid key name: {error}");
        Failure::new(
            cause,
            "use a `credbroker` binary of the same version as the broker",
        )
    })?;
    let target = KeyTarget {
        account: options.account.clone(),
        key,
        vault,
        admin,
        before: state,
        in_rules,
    };
    let found = target.read_metadata().await?;
    target.check(command, &found, options.enable)?;

    let hint = format!(
        "{target} is used for {}: enter a key with the permissions needed for that, and no others.",
        scopes_of(&target.before).join(", ")
    );
    say(paragraph("", &hint).trim_end());
    let input = secrets::read(target.before.needs_partner_key).await;
    let input = input.map_err(|error| {
        let fix = match error {
            InputError::Utf16 => UTF8,
            InputError::Interrupted | InputError::Io(_) | InputError::Refused(_) => RERUN,
        };
        target.not_stored(&found, &error.to_string(), fix)
    })?;
    for remark in &input.remarks {
        say(paragraph("note: ", remark).trim_end());
    }
    say("testing the key with KuCoin …");
    let request = TestKeyRequest {
        account: target.account.to_string(),
        key: target.key.to_string(),
        candidate: Some(candidate(&input.values)),
        try_order: options.try_order,
    };
    let mut test = broker.test(request).await?;
    target
        .compare(&found, &mut test, options.other_account)
        .await?;
    let style = Style::of_stdout();
    let shown = report(
        style,
        target.account.as_str(),
        &test,
        Clock::system().wall_ms(),
    );
    if show(&(shown + "\n"), DONE) != DONE {
        return Err(target.not_stored(&found, "cannot print the report", RERUN));
    }
    if is_refused(&test) {
        let fix = "apply each `fix:` above, then re-run the command";
        return Err(target.not_stored(&found, "the key failed its test", fix));
    }
    if test.is_inconclusive {
        let cause = "the test was inconclusive: KuCoin neither accepted nor rejected the key; see `failed` above";
        return Err(target.not_stored(&found, cause, super::UNCLEAR));
    }

    let registration = Registration {
        key_version: if test.key_version == 2 {
            KeyVersion::V2
        } else {
            KeyVersion::V3
        },
        facts: facts(&test, &target.admin),
        values: input.values,
    };
    let version = target.write(&mut broker, &found, &registration).await?;
    let described = target
        .note(version, &registration.facts, options.enable)
        .await;
    let used = target.activate(&mut broker, version, &test.id_sha256).await;
    described.and(used)
}

/// The fix where only a repetition is needed.
const RERUN: &str = "re-run the command";

/// The fix for a key file in UTF-16.
const UTF8: &str = "convert it, for example with `iconv -f UTF-16 -t UTF-8 key.json`, or write it with `Out-File -Encoding utf8`";

/// The key to register, with its state before and the connection to Vault.
struct KeyTarget {
    account: AccountId,
    key: KeyName,
    vault: Vault,
    admin: AdminId,
    /// Its state in the broker before.
    before: KeyState,
    /// Accounts that the rules name.
    in_rules: BTreeSet<String>,
}

impl std::fmt::Display for KeyTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.account, self.key)
    }
}

impl KeyTarget {
    /// Reads the key's metadata in Vault; prints a note if it does not describe the newest version.
    async fn read_metadata(&self) -> Result<Metadata, Failure> {
        let found = self.vault.find(&self.account, &self.key).await;
        let found = found.map_err(|error| unreached(&error))?;
        // A mount of KV version 1 has no such path either, and would store the key in another format.
        if found.is_none()
            && let Some(problem) = self.vault.mount_problem().await
        {
            let fix = format!(
                "set mount in [vault] of admin.toml to a mount of KV version 2; {NEW_MOUNT}"
            );
            return Err(Failure::new(format!("{problem}; nothing was stored"), fix));
        }
        let found = found.unwrap_or_default();
        if let Some(note) = self.undescribed(&found) {
            say(paragraph("note: ", &note).trim_end());
        }
        Ok(found)
    }

    /// The note about a newest version that the metadata does not describe.
    fn undescribed(&self, found: &Metadata) -> Option<String> {
        let current = found.current_version;
        if !found.has(current) || found.for_version() == Some(current) {
            return None;
        }
        let used = if self.before.version == current {
            format!(
                "The broker uses this version (id SHA-256 {}). Enter the same key to complete its registration, or a different key to \
                 replace it.",
                shown(&self.before.id_sha256)
            )
        } else {
            format!(
                "{} This command starts a new registration.",
                self.in_use(found)
            )
        };
        Some(format!(
            "the metadata in Vault does not describe version {current} of {self}: a previous run was interrupted, the version was written by \
             hand, or somebody replaced the metadata, for example to disable the key. {used}"
        ))
    }

    /// Whether the newest version in Vault is this key, and KuCoin accepts its signatures for bots.
    fn is_in_use(&self, found: &Metadata, digest: &str) -> bool {
        self.before.version == found.current_version
            && self.before.id_sha256 == digest
            && matches!(
                self.before.status(),
                KeyStatus::Active | KeyStatus::AtRisk | KeyStatus::Expiring
            )
    }

    /// Checks before the prompt for the key.
    fn check(&self, command: Command, found: &Metadata, enable: bool) -> Result<(), Failure> {
        let (account, key) = (&self.account, &self.key);
        let exists = found.before(u64::MAX).is_some();
        if command == Command::Rotate && !exists {
            return Err(Failure::new(
                format!("Vault has no version of {self} to replace; nothing was stored"),
                format!(
                    "run `credbroker keys register {account} --key {key}` to register the first key"
                ),
            ));
        }
        match found.state() {
            StoredState::Disabled(word) if !enable => Err(Failure::new(
                format!("{self} is disabled in Vault (state={word}); nothing was stored"),
                "find out who disabled it and why; then pass --enable to register the key and enable it",
            )),
            StoredState::Unknown(word) if !enable => Err(Failure::new(
                format!("{self}: {}; nothing was stored", unknown_state(word)),
                "find out who set it and why; then pass --enable to register the key and set state=active",
            )),
            StoredState::Active | StoredState::Disabled(_) | StoredState::Unknown(_) => Ok(()),
        }
    }

    /// Adds to `test` the findings from a comparison with other keys in Vault.
    async fn compare(
        &self,
        found: &Metadata,
        test: &mut TestKeyResponse,
        other_account: bool,
    ) -> Result<(), Failure> {
        let uid = test.info.as_ref().map_or("", |info| info.uid.as_str());
        let mut findings = Vec::new();
        let is_known = found.for_version() == Some(found.current_version);
        if let Some(before) = found.uid().filter(|before| is_known && *before != uid)
            && !uid.is_empty()
            && !other_account
        {
            findings.push(Finding {
                name: "account-changed".to_owned(),
                is_error: true,
                cause: format!(
                    "The key belongs to KuCoin account {uid}, but the previous key belongs to {before}: bots of {} would \
                     trade on another KuCoin account.",
                    self.account
                ),
                fix: format!(
                    "Use a key of KuCoin account {before}. To change the KuCoin account on purpose, add --other-account."
                ),
            });
        }
        let is_reported = test
            .findings
            .iter()
            .any(|finding| finding.name == "key-taken");
        if !is_reported && (!test.id_sha256.is_empty() || !uid.is_empty()) {
            let duplicate_key = self.duplicate_key(&test.id_sha256, uid).await;
            let duplicate_key = duplicate_key.map_err(|error| {
                let cause = format!("cannot check whether another account has this key: {error}");
                self.not_stored(found, &cause, VAULT)
            })?;
            findings.extend(duplicate_key.map(Finding::from));
        }
        test.findings.splice(0..0, findings);
        Ok(())
    }

    /// Finds a key of another account that is this key, or of the same KuCoin account, by the metadata in Vault.
    async fn duplicate_key(
        &self,
        digest: &str,
        uid: &str,
    ) -> Result<Option<Diagnosis>, VaultError> {
        for account in self.vault.accounts().await? {
            if account == self.account {
                continue;
            }
            for key in self.vault.keys(&account).await? {
                let Some(found) = self.vault.find(&account, &key).await? else {
                    continue;
                };
                if has(&found, digest, uid) {
                    let mut duplicate_key = key_info::duplicate_key(account.as_str(), key.as_str());
                    if !self.in_rules.contains(account.as_str()) {
                        let free = format!(
                            " Account {account} is not in the rules of this broker: if no other broker uses it, delete \
                             the versions of {account}/{key} in Vault (deploy/vault/README.md)."
                        );
                        duplicate_key.fix.push_str(&free);
                    }
                    return Ok(Some(duplicate_key));
                }
            }
        }
        Ok(None)
    }

    /// Writes the key; returns its version.
    async fn write(
        &self,
        broker: &mut Admin,
        found: &Metadata,
        registration: &Registration,
    ) -> Result<u64, Failure> {
        let (account, key, current) = (&self.account, &self.key, found.current_version);
        let digest = &registration.facts.key_sha256;
        // No test covers the partner key: it may have changed.
        if self.is_in_use(found, digest) && registration.values.partner_key.is_none() {
            say(&format!(
                "Vault already holds this key as version {current}; not writing it again"
            ));
            return Ok(current);
        }
        let written = match self.vault.write(account, key, registration, current).await {
            Err(WriteError::Unclear(problem)) => {
                self.settle(broker, problem, current, digest).await
            }
            written => written,
        };
        written.map_err(|error| match error {
            WriteError::Unclear(_) => Failure::new(
                format!(
                    "{error}. Vault may hold the new key as version {}. {} If the new version appears in Vault later, the \
                     broker does not use it until KuCoin accepts its signatures.",
                    current + 1,
                    self.in_use(found)
                ),
                "re-run the command once Vault is reachable; it reports which key Vault holds, and continues",
            ),
            WriteError::Stale { .. } => Failure::new(
                format!("{error}; nothing was stored"),
                "find out who else registers keys for this account; then re-run the command",
            ),
            WriteError::Refused(_) | WriteError::Vault(_) => {
                self.not_stored(found, &error.to_string(), VAULT)
            }
        })
    }

    /// Finds out whether an unclear write on top of version `cas` took effect: the broker reports which key is in Vault.
    async fn settle(
        &self,
        broker: &mut Admin,
        problem: String,
        cas: u64,
        digest: &str,
    ) -> Result<u64, WriteError> {
        let unclear = Err(WriteError::Unclear(problem));
        let newest = self.vault.find(&self.account, &self.key).await;
        // A version that is missing now may still arrive.
        if !matches!(newest, Ok(Some(newest)) if newest.current_version == cas + 1) {
            return unclear;
        }
        match self.refresh_until(broker, cas + 1).await {
            Ok(state) if state.version != cas + 1 => unclear,
            Ok(state) if state.id_sha256 == digest => Ok(cas + 1),
            Ok(_) => Err(WriteError::Stale {
                expected: cas,
                found: cas + 1,
            }),
            Err(_) => unclear,
        }
    }

    /// Has the broker refresh the key until it uses this version or a newer one, at most [`REFRESHES`] times.
    async fn refresh_until(&self, broker: &mut Admin, version: u64) -> Result<KeyState, Failure> {
        let mut refreshes = 1;
        loop {
            let state = broker.refresh(&self.account, &self.key).await?;
            if state.version >= version || refreshes == REFRESHES {
                return Ok(state);
            }
            refreshes += 1;
            sleep(REFRESH_PAUSE).await;
        }
    }

    /// Describes the written version in the key's metadata.
    async fn note(&self, version: u64, facts: &StoredFacts, enable: bool) -> Result<u8, Failure> {
        let mut notes = Notes::registered(version, facts);
        if enable {
            notes = notes.and(Notes::state(true));
        }
        let written = self.vault.note(&self.account, &self.key, &notes).await;
        written.map(|_| DONE).map_err(|error| {
            Failure::new(
                format!(
                    "version {version} of {self} is stored in Vault, but its metadata could not be updated: {error}. The metadata \
                     may not describe this version yet, and a hold may still be in effect"
                ),
                "re-run the command with the same key; it continues from there",
            )
        })
    }

    /// Has the broker use the version, and reports the result.
    async fn activate(
        &self,
        broker: &mut Admin,
        version: u64,
        digest: &str,
    ) -> Result<u8, Failure> {
        let (account, key) = (&self.account, &self.key);
        let state = self.refresh_until(broker, version).await.map_err(|failure| {
            let Failure::Failed { cause, fix } = failure else {
                return failure;
            };
            let cause = format!(
                "version {version} of {self} is in Vault, and brokers switch to it at their next poll (vault.poll_s) if KuCoin \
                 accepts it; could not check whether this broker has already switched: {cause}"
            );
            Failure::Failed { cause, fix }
        })?;
        if state.version == version && state.id_sha256 == digest {
            return Ok(self.show_done(&state));
        }
        if state.version > version {
            let newer = state.version;
            return Err(Failure::new(
                format!(
                    "version {version} of {self} is in Vault, but somebody else wrote version {newer} after it, and the broker \
                     uses that one"
                ),
                "find out who else registers keys for this account; if your key is the right one, re-run the command",
            ));
        }
        let why = joined(state.reasons.iter().map(String::as_str));
        let used = match state.version {
            0 => "No key is in use.".to_owned(),
            used => format!("Version {used} stays in use."),
        };
        Err(Failure::new(
            format!(
                "version {version} of {self} is in Vault, but the broker does not use it: {why}. {used}"
            ),
            format!(
                "remove the cause; the broker then starts using the version automatically. If you cannot, run \
                 `credbroker keys rollback {account} --key {key}`, so that the broker does not use this version when it restarts; then register another key"
            ),
        ))
    }

    fn show_done(&self, state: &KeyState) -> u8 {
        let (before, version) = (&self.before, state.version);
        let done = format!(
            "{self}: version {version} is in use, and KuCoin accepts its signatures.{}",
            retired(before, version)
        );
        let mut text = paragraph("", &done);
        for reason in &state.reasons {
            text += &paragraph("note: ", &printable(reason));
        }
        let is_another = !before.id_sha256.is_empty() && before.id_sha256 != state.id_sha256;
        if is_another {
            let next = format!(
                "once your bots work with the new key, delete the previous key (id SHA-256 {}) on KuCoin's API \
                 Management page; until then, `credbroker keys rollback {} --key {}` returns to it",
                shown(&before.id_sha256),
                self.account,
                self.key,
            );
            text += &paragraph("next: ", &next);
        }
        show(&text, DONE)
    }

    /// A failure after which nothing of the new key is in Vault.
    fn not_stored(&self, found: &Metadata, cause: &str, fix: &str) -> Failure {
        let cause = format!("{cause}; nothing was stored. {}", self.in_use(found));
        Failure::new(cause, fix)
    }

    /// Which version is in use as long as nothing changes.
    fn in_use(&self, found: &Metadata) -> String {
        match (self.before.version, found.current_version) {
            (0, 0) => format!("{self} has no key."),
            (0, current) => format!(
                "Vault holds version {current} of {self}, but this broker has not loaded it."
            ),
            (used, _) => format!("Version {used} of {self} stays in use."),
        }
    }
}

/// Whether the metadata describe an existing version as this key, or as a key of the same KuCoin account.
fn has(found: &Metadata, digest: &str, uid: &str) -> bool {
    let is_same = |stored: Option<&str>, new: &str| !new.is_empty() && stored == Some(new);
    // If the described version was deleted since, nobody uses that key.
    let exists = found
        .for_version()
        .is_some_and(|version| found.has(version));
    exists && (is_same(found.key_sha256(), digest) || is_same(found.uid(), uid))
}

fn unreached(error: &VaultError) -> Failure {
    let cause = format!("cannot read the key's metadata in Vault: {error}; nothing was stored");
    Failure::new(cause, VAULT)
}

/// The key as a message, which wipes its values on drop.
fn candidate(values: &KeyValues) -> Candidate {
    // All values were UTF-8 when they were read.
    let text = |bytes: &[u8]| str::from_utf8(bytes).unwrap_or_default().to_owned();
    let partner_key = values.partner_key.as_ref().map(PartnerKey::expose);
    Candidate {
        api_key: values.api_key.to_string(),
        api_secret: text(values.api_secret.expose()),
        passphrase: text(values.passphrase.expose()),
        key_version: 0,
        partner_key: partner_key.map(text).unwrap_or_default(),
    }
}

fn facts(test: &TestKeyResponse, admin: &AdminId) -> StoredFacts {
    let KeyInfo {
        uid,
        site,
        permissions,
        ip_whitelist,
        expires_at_ms,
        ..
    } = test.info.clone().unwrap_or_default();
    StoredFacts {
        uid,
        site,
        permissions,
        ip_whitelist,
        expires_at_ms,
        registered_by: admin.to_string(),
        registered_at_ms: Clock::system().wall_ms(),
        key_sha256: test.id_sha256.clone(),
    }
}
