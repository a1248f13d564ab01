//! `credbroker keys register` and `keys rotate`: a key is tested, then written to Vault, then put to use.
//!
//! Vault is written in two steps: the version itself (whole, on top of the one that was seen), then the note of what it
//! is. The key that served goes on until KuCoin takes what the new one signs. Where the answer to the first step is lost,
//! the broker says which key has arrived.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use tokio::time::sleep;

use super::common::{VAULT, ended, pick, scopes_of, shown};
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
    Candidate, Finding, KeyFacts, KeyState, KeyStatus, TestKeyRequest, TestKeyResponse,
};
use crate::vault::{
    Metadata, NotedState, Notes, Registration, StoredFacts, Vault, VaultError, WriteError,
    unknown_state,
};

/// How often the broker is asked to look at a new version; each look tests it, and takes as long as that.
const LOOKS: usize = 3;

/// The wait between two of them.
const LOOK_AFTER: Duration = Duration::from_secs(2);

#[derive(Args, Debug)]
pub(in crate::cli) struct Options {
    /// Account, as the rules name it.
    account: AccountId,
    /// Scope that the key serves; may be repeated. Default: the scopes in the rules.
    #[arg(long = "scope", value_parser = crate::cli::scope)]
    scopes: Vec<Scope>,
    /// Name of the key, where the account has several.
    #[arg(long)]
    key: Option<KeyName>,
    /// Has an order validated too, by the exchange's test endpoint, in each scope that has one; none is placed.
    #[arg(long)]
    try_order: bool,
    /// Takes a key of another KuCoin account than the key before it.
    #[arg(long)]
    other_account: bool,
    /// Switches the key on again if it is disabled in Vault.
    #[arg(long)]
    enable: bool,
    /// How to reach the broker and Vault.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

/// Which of the two commands it is.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(super) enum Command {
    /// The first key, or another one.
    Register,
    /// Another key in the place of one that is there.
    Rotate,
}

pub(super) fn run(command: Command, options: &Options) -> u8 {
    // Before there is a secret, or a second thread.
    harden();
    block_on(async || {
        let mut signals = Signals::of_a_command().map_err(|error| {
            Failure::new(format!("cannot install signal handlers: {error}"), AGAIN)
        })?;
        tokio::select! {
            // First, because the prompt hears of it too, and has more to say.
            biased;
            ended = register(command, options) => ended,
            _ = signals.next() => Err(Failure::new(
                "interrupted",
                "re-run the command: it shows what Vault holds, and continues",
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
        let what = format!("the broker returned an invalid key name: {error}");
        Failure::new(what, "use the `credbroker` of the broker's version")
    })?;
    let target = KeyTarget {
        account: options.account.clone(),
        key,
        vault,
        admin,
        before: state,
        in_rules,
    };
    let found = target.look().await?;
    target.check(command, &found, options.enable)?;

    let wanted = format!(
        "{target} serves {}: give a key that may do that, and no more.",
        scopes_of(&target.before).join(", ")
    );
    say(paragraph("", &wanted).trim_end());
    let given = secrets::read(target.before.needs_partner_key).await;
    let given = given.map_err(|error| {
        let fix = match error {
            InputError::Utf16 => UTF8,
            InputError::Interrupted | InputError::Io(_) | InputError::Refused(_) => AGAIN,
        };
        target.undone(&found, &error.to_string(), fix)
    })?;
    for remark in &given.remarks {
        say(paragraph("note: ", remark).trim_end());
    }
    say("testing it with KuCoin …");
    let request = TestKeyRequest {
        account: target.account.to_string(),
        key: target.key.to_string(),
        candidate: Some(candidate(&given.values)),
        try_order: options.try_order,
    };
    let mut test = broker.test(request).await?;
    target
        .compare(&found, &mut test, options.other_account)
        .await?;
    let style = Style::of_stdout();
    let told = report(
        style,
        target.account.as_str(),
        &test,
        Clock::system().wall_ms(),
    );
    if show(&(told + "\n"), DONE) != DONE {
        return Err(target.undone(&found, "the report cannot be shown", AGAIN));
    }
    if is_refused(&test) {
        let fix = "apply the `fix:` above and re-run the command";
        return Err(target.undone(&found, "the key is refused", fix));
    }
    if test.is_unclear {
        let what = "KuCoin has not said whether the key is good: see `failed` above";
        return Err(target.undone(&found, what, super::UNCLEAR));
    }

    let registration = Registration {
        key_version: if test.key_version == 2 {
            KeyVersion::V2
        } else {
            KeyVersion::V3
        },
        facts: facts(&test, &target.admin),
        values: given.values,
    };
    let version = target.write(&mut broker, &found, &registration).await?;
    let noted = target
        .note(version, &registration.facts, options.enable)
        .await;
    let used = target.activate(&mut broker, version, &test.id_sha256).await;
    noted.and(used)
}

/// What to do where nothing else is to be done.
const AGAIN: &str = "re-run the command";

/// What to do with a key file in UTF-16.
const UTF8: &str = "convert it, for example with `iconv -f UTF-16 -t UTF-8 key.json`, or write it with `Out-File -Encoding utf8`";

/// A key of an account, and the way to it.
struct KeyTarget {
    account: AccountId,
    key: KeyName,
    vault: Vault,
    admin: AdminId,
    /// How the broker had it before.
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
    /// What Vault has; says when nothing is noted about its newest version.
    async fn look(&self) -> Result<Metadata, Failure> {
        let found = self.vault.find(&self.account, &self.key).await;
        let found = found.map_err(|error| unreached(&error))?;
        // A mount of KV version 1 has no such path either, and would take the key as a secret of another shape.
        if found.is_none()
            && let Some(problem) = self.vault.unfit_mount().await
        {
            let fix =
                format!("set mount in [vault] of admin.toml to a mount of version 2; {NEW_MOUNT}");
            return Err(Failure::new(format!("{problem}; nothing was stored"), fix));
        }
        let found = found.unwrap_or_default();
        if let Some(told) = self.not_noted(&found) {
            say(paragraph("note: ", &told).trim_end());
        }
        Ok(found)
    }

    /// What is told of a newest version that has no note.
    fn not_noted(&self, found: &Metadata) -> Option<String> {
        let current = found.current_version;
        if !found.has(current) || found.for_version() == Some(current) {
            return None;
        }
        let used = if self.before.version == current {
            format!(
                "The broker uses it (id SHA-256 {}). Give the same key to finish that run, or another key to replace it.",
                shown(&self.before.id_sha256)
            )
        } else {
            format!("{} This run starts over.", self.in_use(found))
        };
        Some(format!(
            "Vault holds version {current} of {self}, and no note of what it is: a previous run was interrupted, or somebody wrote that version by hand. {used}"
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

    /// What can be known before a key is asked for.
    fn check(&self, command: Command, found: &Metadata, enable: bool) -> Result<(), Failure> {
        let (account, key) = (&self.account, &self.key);
        let is_there = found.before(u64::MAX).is_some();
        if command == Command::Rotate && !is_there {
            return Err(Failure::new(
                format!(
                    "Vault has no version of {self} that another key could replace; nothing was stored"
                ),
                format!("`credbroker keys register {account} --key {key}` registers the first one"),
            ));
        }
        match found.state() {
            NotedState::Disabled(word) if !enable => Err(Failure::new(
                format!(
                    "{self} is disabled in Vault (state={word}), and registering a key would enable it; nothing was stored"
                ),
                "find out who has disabled it and why; --enable registers a key and switches it on",
            )),
            NotedState::Unknown(word) if !enable => Err(Failure::new(
                format!("{self}: {}; nothing was stored", unknown_state(word)),
                "find out what was meant; --enable registers a key and sets state=active",
            )),
            NotedState::Active | NotedState::Disabled(_) | NotedState::Unknown(_) => Ok(()),
        }
    }

    /// Adds to `test` what is wrong with the key beside others that Vault has.
    async fn compare(
        &self,
        found: &Metadata,
        test: &mut TestKeyResponse,
        other_account: bool,
    ) -> Result<(), Failure> {
        let uid = test.facts.as_ref().map_or("", |facts| facts.uid.as_str());
        let mut findings = Vec::new();
        let is_known = found.for_version() == Some(found.current_version);
        if let Some(before) = found.uid().filter(|before| is_known && *before != uid)
            && !uid.is_empty()
            && !other_account
        {
            findings.push(Finding {
                name: "account-changed".to_owned(),
                is_refusal: true,
                cause: format!(
                    "The key belongs to KuCoin account {uid}, and the key before it to {before}: bots of {} would trade in \
                     another account.",
                    self.account
                ),
                fix: format!(
                    "Use a key of KuCoin account {before}. If the account is meant to change, add --other-account."
                ),
            });
        }
        let is_told = test
            .findings
            .iter()
            .any(|finding| finding.name == "key-taken");
        if !is_told && (!test.id_sha256.is_empty() || !uid.is_empty()) {
            let duplicate_key = self.duplicate_key(&test.id_sha256, uid).await;
            let duplicate_key = duplicate_key.map_err(|error| {
                let what =
                    format!("whether another account has the key cannot be checked: {error}");
                self.undone(found, &what, VAULT)
            })?;
            findings.extend(duplicate_key.map(Finding::from));
        }
        test.findings.splice(0..0, findings);
        Ok(())
    }

    /// The key of another account that is this one, or one of the same KuCoin account, by what is noted in Vault.
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
                            " The rules of this broker do not name account {account}: if no other broker does, delete \
                             the versions of {account}/{key} in Vault, as deploy/vault/README.md shows."
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
        // A partner key is not seen by any test: it may be another one.
        if self.is_in_use(found, digest) && registration.values.partner_key.is_none() {
            say(&format!(
                "Vault holds this key as version {current}; it is not written again."
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
                    "{error}. Vault holds the new key as version {}, or what it held before. {} A new version that arrives \
                     late is used only once KuCoin accepts its signatures.",
                    current + 1,
                    self.in_use(found)
                ),
                "re-run the command once Vault answers: it shows which key Vault holds, and continues",
            ),
            WriteError::Stale { .. } => Failure::new(
                format!("{error}; nothing was stored"),
                "ask who else registers keys for this account; then re-run the command",
            ),
            WriteError::Refused(_) | WriteError::Vault(_) => {
                self.undone(found, &error.to_string(), VAULT)
            }
        })
    }

    /// Finds out what became of an unclear write on top of version `cas`: the broker says whose version is in Vault.
    async fn settle(
        &self,
        broker: &mut Admin,
        problem: String,
        cas: u64,
        digest: &str,
    ) -> Result<u64, WriteError> {
        let unclear = Err(WriteError::Unclear(problem));
        let newest = self.vault.find(&self.account, &self.key).await;
        // A version that is not there yet may still arrive.
        if !matches!(newest, Ok(Some(newest)) if newest.current_version == cas + 1) {
            return unclear;
        }
        match self.look_for(broker, cas + 1).await {
            Ok(state) if state.version != cas + 1 => unclear,
            Ok(state) if state.id_sha256 == digest => Ok(cas + 1),
            Ok(_) => Err(WriteError::Stale {
                expected: cas,
                found: cas + 1,
            }),
            Err(_) => unclear,
        }
    }

    /// Has the broker look at Vault until it uses this version or a newer one, but not for ever.
    async fn look_for(&self, broker: &mut Admin, version: u64) -> Result<KeyState, Failure> {
        let mut looks = 1;
        loop {
            let state = broker.refresh(&self.account, &self.key).await?;
            if state.version >= version || looks == LOOKS {
                return Ok(state);
            }
            looks += 1;
            sleep(LOOK_AFTER).await;
        }
    }

    /// Notes what was written.
    async fn note(&self, version: u64, facts: &StoredFacts, enable: bool) -> Result<u8, Failure> {
        let mut notes = Notes::registered(version, facts);
        if enable {
            notes = notes.and(Notes::state(true));
        }
        let written = self.vault.note(&self.account, &self.key, &notes).await;
        written.map(|_| DONE).map_err(|error| {
            Failure::new(
                format!(
                    "version {version} of {self} is in Vault, whole; what it is could not be noted beside it, nor that no \
                     other version is to be used: {error}"
                ),
                "re-run the command with the same key: it continues from there",
            )
        })
    }

    /// Has the broker take the version up, and says what came of it.
    async fn activate(
        &self,
        broker: &mut Admin,
        version: u64,
        digest: &str,
    ) -> Result<u8, Failure> {
        let (account, key) = (&self.account, &self.key);
        let state = self.look_for(broker, version).await.map_err(|failure| {
            let Failure::Undone { what, fix } = failure else {
                return failure;
            };
            let what = format!(
                "version {version} of {self} is in Vault, and a broker takes it up within vault.poll_s; whether this one \
                 has is not known: {what}"
            );
            Failure::Undone { what, fix }
        })?;
        if state.version == version && state.id_sha256 == digest {
            return Ok(self.tell_done(&state));
        }
        if state.version > version {
            let newer = state.version;
            return Err(Failure::new(
                format!(
                    "version {version} of {self} is in Vault, but somebody else has written version {newer} after it, which is in \
                     use"
                ),
                "ask who else registers keys for this account; if yours is the right one, re-run the command",
            ));
        }
        let why = match state.reasons.as_slice() {
            [] => "no reason given".to_owned(),
            reasons => reasons.join("; "),
        };
        let used = match state.version {
            0 => "No key is in use.".to_owned(),
            used => format!("Version {used} stays in use."),
        };
        Err(Failure::new(
            format!(
                "version {version} of {self} is in Vault, and the broker does not use it: {why}. {used}"
            ),
            format!(
                "if you can fix the reason, fix it: the broker then uses the version by itself. If not, `credbroker keys \
                 rollback {account} --key {key}` makes sure that a restart does not take it up either; then register another \
                 key"
            ),
        ))
    }

    fn tell_done(&self, state: &KeyState) -> u8 {
        let (before, version) = (&self.before, state.version);
        let told = format!(
            "{self}: version {version} is in use, and KuCoin accepts its signatures.{}",
            ended(before, version)
        );
        let mut text = paragraph("", &told);
        for reason in &state.reasons {
            text += &paragraph("note: ", &printable(reason));
        }
        let is_another = !before.id_sha256.is_empty() && before.id_sha256 != state.id_sha256;
        if is_another {
            let next = format!(
                "delete the key before it (id SHA-256 {}) on KuCoin's page under API Management, once you are sure that \
                 you do not want to go back to it; `credbroker keys rollback {} --key {}` does that as long as it exists",
                shown(&before.id_sha256),
                self.account,
                self.key,
            );
            text += &paragraph("next: ", &next);
        }
        show(&text, DONE)
    }

    /// Nothing of the new key is in Vault.
    fn undone(&self, found: &Metadata, what: &str, fix: &str) -> Failure {
        let what = format!("{what}; nothing was stored. {}", self.in_use(found));
        Failure::new(what, fix)
    }

    /// What is in force while nothing has changed.
    fn in_use(&self, found: &Metadata) -> String {
        match (self.before.version, found.current_version) {
            (0, 0) => format!("{self} has no key."),
            (0, current) => format!(
                "Vault holds version {current} of {self}, and no broker is known to use it."
            ),
            (used, _) => format!("Version {used} of {self} stays in use."),
        }
    }
}

/// Whether hints say that a version that is there is this key or one of the same KuCoin account.
fn has(found: &Metadata, digest: &str, uid: &str) -> bool {
    let is_same = |noted: Option<&str>, told: &str| !told.is_empty() && noted == Some(told);
    // Hints on a version that was deleted since tell of a key that serves nobody.
    let is_there = found
        .for_version()
        .is_some_and(|version| found.has(version));
    is_there && (is_same(found.key_sha256(), digest) || is_same(found.uid(), uid))
}

fn unreached(error: &VaultError) -> Failure {
    let what = format!("cannot read the key's metadata in Vault: {error}; nothing was stored");
    Failure::new(what, VAULT)
}

/// The key as the call takes it, which wipes it too.
fn candidate(values: &KeyValues) -> Candidate {
    // All of them were text when they were read.
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
    let KeyFacts {
        uid,
        site,
        permissions,
        ip_whitelist,
        expires_at_ms,
        ..
    } = test.facts.clone().unwrap_or_default();
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
