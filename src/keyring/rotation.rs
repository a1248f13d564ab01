//! Decides which version of a key signs, from the metadata in Vault and from key tests on the exchange.
//!
//! A state machine for one key, without I/O, tasks or a clock. [`super::refresh`] passes in one [`Event`] after the other,
//! and performs the returned [`Action`]s before it passes in the next one.
//!
//! A 404, two 403s to a valid token, or `state=disabled` in Vault remove the key at once; with a `state` that is neither
//! active nor disabled, risk-increasing requests are refused. No response or a server error changes nothing: the key in
//! memory stays in use, within the limits of its account.
//!
//! Another version replaces the one in memory once the exchange has accepted requests that it signed. A version that
//! fails its test changes nothing, and the reason is reported. Only after a start there is no key in memory: the newest
//! version is used at once, and if it fails its test, the version before it is tried.
//!
//! While an admin holds a version (`keys rollback`), only that one is used. If the exchange rejects it, a version that was
//! written after the hold began is tried, and never an older one.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use super::Noted;
use super::key_test::{Report, Verdict};
use super::usage::Usage;
use crate::kucoin::Key;
use crate::kucoin::code::CREDENTIALS_REFUSED;
use crate::restrictions::KeyDigest;
use crate::vault::{Hold, Metadata, StoredState, VaultError, unknown_state};

/// Why the key is not available after a 403 to a token that Vault accepts.
const DENIED: &str = "Vault denied the broker access (403); check the broker's Vault policy";

/// The shortest time between two background tests of a key. A test has weight 20, of 2000 per account and 30 s for this
/// kind of request.
const TEST_EVERY: Duration = Duration::from_secs(600);

/// First wait after a background test without an answer; each one in a row doubles it, up to [`TEST_EVERY`].
const TEST_AGAIN: Duration = Duration::from_secs(5);

/// A version of a key, and how the exchange has responded to it.
#[derive(Clone, Debug)]
pub(super) struct ActiveVersion {
    pub(super) key: Arc<Key>,
    pub(super) usage: Arc<Usage>,
    pub(super) version: u64,
}

impl ActiveVersion {
    pub(super) fn digest(&self) -> KeyDigest {
        KeyDigest(self.key.id_sha256())
    }

    /// Whether the exchange has accepted a request that it signed.
    pub(super) fn is_proven(&self) -> bool {
        self.usage.accepted_ms().is_some()
    }

    /// The advice that the bot got, if the exchange rejects the credentials.
    fn refusal(&self) -> Option<String> {
        let refusal = self.usage.refusal()?;
        let is_of_credentials = CREDENTIALS_REFUSED.contains(&refusal.code.as_str());
        is_of_credentials.then_some(refusal.advice)
    }
}

/// What has happened.
#[derive(Debug)]
pub(super) enum Event {
    /// All actions of earlier events are done.
    Idle,
    /// The metadata were read; `true`: an admin requested it, so a rejected version is tried once more.
    Metadata(Result<Metadata, VaultError>, bool),
    /// A key was tested; with a reason, it has been revoked meanwhile.
    Tested(ActiveVersion, Report, Option<String>),
    /// Result of [`Action::Read`] or [`Action::CheckExists`]. After a `Read`, a revoked version is unusable.
    Version(Result<ActiveVersion, VaultError>),
}

/// What to do, in the order returned.
#[derive(Debug)]
pub(super) enum Action {
    /// Use only this version from now on.
    Activate(ActiveVersion),
    /// The same, before any test: the keyring may recall when the next test is due; rejected requests wait for it.
    ActivateUntested(ActiveVersion),
    /// Log that this new version could not be tested yet.
    AwaitTest(u64, String),
    /// Record that Vault has confirmed the key in memory, if there is one.
    Confirm,
    /// Remove the key from memory, for this reason.
    Evict(String),
    /// Check whether Vault still has a version; always the last action.
    CheckExists(u64),
    /// Record that Vault gave no usable response.
    MarkOutage(VaultError),
    /// Store restriction and hold before the key signs again; and the number of the newest version.
    Note(Noted, u64),
    /// Read a version that may be used from Vault; always the last action.
    Read(u64),
    /// Store the test result of the key in memory, and when the next test is due; none if the test got no answer.
    Record(ActiveVersion, Report, Option<Duration>),
    /// Report that this version, written after the hold began, failed its test; the held one stays in use.
    RejectLater(u64, String),
    /// Report that this new version failed its test; the one in memory stays in use.
    RejectTested(ActiveVersion, String),
    /// Report that the wanted version is unusable; the one in memory, this one, stays in use.
    RejectUnusable(u64, String),
    /// Test a version that may be used, on every scope; this replaces a running test.
    TestCandidate(ActiveVersion),
    /// Test the key in memory.
    TestServing(ActiveVersion),
}

/// The state machine.
#[derive(Debug, Default)]
pub(super) struct Rotation {
    /// Time since boot.
    now: Duration,
    /// The key in memory, set only while an event is handled, so that no copy of a wiped key stays here.
    serving: Option<ActiveVersion>,
    /// Actions of the current event.
    actions: Vec<Action>,
    /// The metadata of the last poll; none: the wanted version is read at the next poll.
    seen: Option<Metadata>,
    /// Whether the wanted version is unusable: it is not a valid key, it is revoked, or Vault does not have it.
    is_unusable: bool,
    /// Whether a rejected version is to be tried once more.
    is_fresh: bool,
    /// The wanted version, until its test has a result.
    candidate: Option<ActiveVersion>,
    /// When to try the wanted version again, after it was rejected.
    refused: Option<Duration>,
    /// The version that was tried instead of the held one.
    after_hold: Option<AfterHold>,
    /// When to test the key in memory again.
    next_test: Duration,
    /// How many tests in a row got no answer.
    unanswered: u32,
    /// The purpose of the read that is in progress.
    reading: Option<Reading>,
    /// What is being tested.
    testing: Option<Testing>,
    /// Why another version is not used; reported next to the key in memory.
    problem: Option<String>,
    /// Spreads the tests of many keys out.
    random: fastrand::Rng,
}

/// A version that was tried instead of a held one, which the exchange rejected.
#[derive(Debug)]
struct AfterHold {
    version: u64,
    /// When it may be tried again.
    due: Duration,
    /// Why it was rejected too, or is not a valid key.
    problem: Option<String>,
}

/// The purpose of a read.
#[derive(Debug)]
enum Reading {
    /// Whether the version in memory (the second number; the first is the wanted one) still exists: it has a deletion
    /// time, and the metadata do not change when Vault deletes it.
    Expiring(Metadata, u64, u64),
    /// A version that may replace a rejected one.
    Fallback(u64, Refused),
    /// The wanted version, since the version in memory, this one, has been deleted in Vault.
    Replacement(Metadata, u64),
    /// The wanted version, not read yet or to be tried again.
    Wanted(Metadata),
    /// Whether the wanted version still exists: it has a deletion time.
    WantedExpiring(Metadata, u64),
}

/// What is being tested.
#[derive(Debug)]
enum Testing {
    /// [`Rotation::candidate`].
    Candidate,
    /// A version that may replace a rejected one.
    Fallback(Refused),
    /// The key in memory.
    ActiveVersion,
}

/// The version in memory, which was rejected.
#[derive(Debug)]
struct Refused {
    version: u64,
    key: KeyDigest,
    reason: String,
    /// Whether the fallback is a version written after a hold began; otherwise it is the version before this one.
    is_held: bool,
}

impl Rotation {
    /// Handles an event at `now` (time since boot), while `serving` is in memory; returns what to do.
    pub(super) fn step(
        &mut self,
        now: Duration,
        serving: Option<ActiveVersion>,
        event: Event,
    ) -> Vec<Action> {
        (self.now, self.serving) = (now, serving);
        match event {
            Event::Idle => self.test_if_due(),
            Event::Metadata(answer, is_fresh) => {
                self.is_fresh |= is_fresh;
                match answer {
                    Ok(metadata) => self.compare(metadata),
                    Err(error) => self.fail(error),
                }
            }
            Event::Tested(tested, report, revoked) => match self.testing.take() {
                Some(Testing::Candidate) => self.judge(tested, report, revoked),
                Some(Testing::Fallback(refused)) => {
                    let is_refused = |key: &ActiveVersion| {
                        (key.version, key.digest()) == (refused.version, refused.key)
                    };
                    let may_sign =
                        revoked.is_none() && self.serving.as_ref().is_some_and(is_refused);
                    self.fall_back(tested, report, may_sign, &refused);
                }
                Some(Testing::ActiveVersion) => self.record(tested, report),
                None => {}
            },
            Event::Version(answer) => self.handle_read(answer),
        }
        self.serving = None;
        mem::take(&mut self.actions)
    }

    /// Sets when to test the key that has just been activated, if the keyring recalls it; otherwise at once.
    pub(super) fn recall(&mut self, due: Option<Duration>) {
        self.next_test = due.unwrap_or_default();
    }

    /// Forgets candidate and metadata, since the key is no longer in memory; the next poll reads the key again.
    pub(super) fn forget(&mut self) {
        self.seen = None;
        self.forget_candidate();
        self.testing = None;
        self.problem = None;
    }

    /// Whether a poll has read the metadata since the last [`Self::forget`].
    pub(super) fn has_seen(&self) -> bool {
        self.seen.is_some()
    }

    /// Whether a test is running; any event may end it.
    pub(super) fn is_testing(&self) -> bool {
        self.testing.is_some()
    }

    /// Why another version is not used.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.clone()
    }

    /// Compares the metadata with those of the last poll.
    fn compare(&mut self, metadata: Metadata) {
        let restricted = match metadata.state() {
            StoredState::Active => None,
            StoredState::Disabled(word) => {
                return self.evict(format!(
                    "disabled in Vault (state={word} in its custom metadata)"
                ));
            }
            StoredState::Unknown(word) => Some(format!(
                "{}; set state=active or state=disabled",
                unknown_state(word)
            )),
        };
        let (hold, newest) = (metadata.hold(), metadata.current_version);
        self.act(Action::Note(Noted { restricted, hold }, newest));
        if newest == 0 {
            return self.evict("Vault has no version of it yet".to_owned());
        }
        let wanted = metadata.wanted();
        let serving = version_of(self.serving.as_ref());
        let has_lost = |seen: &Metadata| serving.filter(|&used| metadata.has_lost(seen, used));
        if let Some(lost) = self.seen.as_ref().and_then(has_lost) {
            // The wanted version replaces it without a test, so that there is no gap.
            self.forget_candidate();
            self.testing = None;
            return match wanted {
                Ok(wanted) => self.read(wanted, Reading::Replacement(metadata, lost)),
                Err(reason) => self.lose(lost, VaultError::Unusable(reason)),
            };
        }
        match (wanted, serving) {
            (Err(reason), _) => {
                self.seen = Some(metadata);
                self.reject(reason);
            }
            (Ok(wanted), Some(used)) if used != wanted && metadata.has_deletion_time(used) => {
                self.reading = Some(Reading::Expiring(metadata, wanted, used));
                self.act(Action::CheckExists(used));
            }
            (Ok(wanted), _) => self.choose(metadata, wanted),
        }
    }

    /// Reads the wanted version, unless nothing has changed.
    fn choose(&mut self, metadata: Metadata, wanted: u64) {
        let is_fresh = mem::take(&mut self.is_fresh);
        if is_fresh {
            self.after_hold = None;
        }
        let seen = self.seen.as_ref();
        let is_same = seen.is_some_and(|seen| metadata.is_same(seen, wanted));
        let was_wanted = seen.is_some_and(|seen| seen.wanted() == Ok(wanted));
        let is_due = match &self.serving {
            Some(_) => self.refused.is_some_and(|due| self.now >= due),
            None => !self.is_unusable,
        };
        let is_known = self.is_serving(wanted) || self.is_candidate(wanted);
        let is_new = !is_same || !is_known && (is_fresh || !was_wanted || is_due);
        if is_fresh && !is_new && self.is_serving(wanted) {
            self.next_test = Duration::ZERO;
        }
        if is_new {
            self.read(wanted, Reading::Wanted(metadata));
        } else if metadata.has_deletion_time(wanted) {
            self.reading = Some(Reading::WantedExpiring(metadata, wanted));
            self.act(Action::CheckExists(wanted));
        } else {
            self.confirm_unchanged(metadata, wanted);
        }
    }

    /// Handles metadata without a change.
    fn confirm_unchanged(&mut self, metadata: Metadata, wanted: u64) {
        self.seen = Some(metadata);
        if self.is_serving(wanted) {
            self.forget_candidate();
            self.problem = self.problem_after_hold();
        }
        self.act(Action::Confirm);
        if self.is_candidate(wanted) {
            self.try_candidate();
        }
        if let Some(serving) = &self.serving
            && let Some(reason) = serving.refusal()
        {
            let refused = (serving.version, serving.digest());
            self.try_after_hold(refused, reason);
        }
    }

    /// Handles the result of a read.
    fn handle_read(&mut self, answer: Result<ActiveVersion, VaultError>) {
        let Some(reading) = self.reading.take() else {
            return;
        };
        match (reading, answer) {
            (Reading::Expiring(metadata, wanted, used), Err(VaultError::Gone(_))) => {
                self.evict_deleted(used);
                self.choose(metadata, wanted);
            }
            (Reading::Expiring(metadata, wanted, _), Ok(_) | Err(VaultError::Unusable(_))) => {
                self.choose(metadata, wanted);
            }
            (Reading::Fallback(_, refused), Ok(next)) => {
                self.test(next, Testing::Fallback(refused));
            }
            (Reading::Fallback(version, refused), Err(VaultError::Unusable(problem)))
                if refused.is_held =>
            {
                self.give_up_after_hold(version, problem);
            }
            (Reading::Fallback(..), Err(_)) => {}
            (Reading::Replacement(metadata, _), Ok(next)) => {
                self.seen = Some(metadata);
                self.activate_untested(next);
            }
            (Reading::Replacement(_, lost), Err(error)) => self.lose(lost, error),
            (Reading::Wanted(metadata), Ok(next)) => {
                self.seen = Some(metadata);
                self.forget_candidate();
                self.candidate = Some(next);
                self.act(Action::Confirm);
                self.try_candidate();
            }
            (Reading::WantedExpiring(metadata, wanted), Ok(_)) => {
                self.confirm_unchanged(metadata, wanted);
            }
            (
                Reading::Wanted(metadata) | Reading::WantedExpiring(metadata, _),
                Err(VaultError::Unusable(reason)),
            ) => {
                // Mark as seen, so that a broken version is read once and not at every poll.
                self.seen = Some(metadata);
                self.reject(reason);
            }
            (_, Err(error)) => self.fail(error),
        }
    }

    fn fail(&mut self, error: VaultError) {
        match error {
            VaultError::Credential(_) | VaultError::LoginRefused(_) | VaultError::Outage(_) => {
                self.act(Action::MarkOutage(error));
            }
            VaultError::Denied => self.evict(DENIED.to_owned()),
            VaultError::Gone(reason) => self.evict(reason),
            VaultError::Unusable(reason) => self.reject(reason),
        }
    }

    /// The version in memory has been deleted in Vault, and no other can be used.
    fn lose(&mut self, version: u64, error: VaultError) {
        self.evict_deleted(version);
        self.fail(error);
    }

    /// The wanted version is unusable. That must not remove a working key.
    fn reject(&mut self, reason: String) {
        self.forget_candidate();
        let exists = |version: &u64| self.seen.as_ref().is_some_and(|seen| seen.has(*version));
        if let Some(version) = version_of(self.serving.as_ref()).filter(exists) {
            self.problem = Some(reason.clone());
            self.act(Action::RejectUnusable(version, reason));
            self.act(Action::Confirm);
        } else {
            let seen = self.seen.take();
            self.evict(reason);
            // Keep the metadata, so that it is read again only once they change, and not at every poll.
            self.seen = seen;
        }
        self.is_unusable = true;
    }

    fn evict_deleted(&mut self, version: u64) {
        self.evict(format!("version {version} has been deleted in Vault"));
    }

    fn evict(&mut self, reason: String) {
        self.forget();
        self.serving = None;
        self.act(Action::Evict(reason));
    }

    /// Drops the candidate, since another version is wanted now.
    fn forget_candidate(&mut self) {
        if self.candidate.take().is_some() {
            self.testing = None;
        }
        self.refused = None;
        self.is_unusable = false;
    }

    fn is_candidate(&self, version: u64) -> bool {
        version_of(self.candidate.as_ref()) == Some(version)
    }

    fn is_serving(&self, version: u64) -> bool {
        version_of(self.serving.as_ref()) == Some(version)
    }

    /// Tests the candidate, unless its test is running; without a key in memory, uses it at once.
    fn try_candidate(&mut self) {
        if matches!(self.testing, Some(Testing::Candidate)) {
            return;
        }
        if self.serving.is_none() {
            if let Some(next) = self.candidate.take() {
                self.activate_untested(next);
            }
        } else if let Some(next) = self.candidate.clone() {
            self.test(next, Testing::Candidate);
        }
    }

    fn activate(&mut self, next: ActiveVersion, report: Report) {
        self.problem = None;
        self.next_test = self.after_test();
        self.act(Action::Activate(next.clone()));
        self.act(Action::Record(next, report, Some(self.next_test)));
    }

    fn activate_untested(&mut self, next: ActiveVersion) {
        self.problem = None;
        self.act(Action::ActivateUntested(next));
    }

    fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    fn read(&mut self, version: u64, reading: Reading) {
        self.reading = Some(reading);
        self.act(Action::Read(version));
    }

    fn test(&mut self, next: ActiveVersion, testing: Testing) {
        self.testing = Some(testing);
        self.act(Action::TestCandidate(next));
    }

    /// Tests the key in memory when its test is due; a new key is due at once.
    fn test_if_due(&mut self) {
        if self.testing.is_some() || self.now < self.next_test {
            return;
        }
        if let Some(serving) = self.serving.clone() {
            self.next_test = self.after_test();
            self.testing = Some(Testing::ActiveVersion);
            self.act(Action::TestServing(serving));
        }
    }

    /// Handles the test result of the wanted version.
    fn judge(&mut self, next: ActiveVersion, report: Report, revoked: Option<String>) {
        self.candidate = None;
        let version = next.version;
        let is_current_rejected = || {
            self.serving
                .as_ref()
                .and_then(ActiveVersion::refusal)
                .is_some()
        };
        match (report.verdict.clone(), revoked) {
            (Verdict::Refused(reason), _) => {
                self.problem = Some(format!("version {version} was rejected: {reason}"));
                self.refused = Some(self.after_test());
                self.act(Action::RejectTested(next, reason));
            }
            // An exchange that returns facts about the key accepts its signatures: enough to replace a rejected key.
            (Verdict::Unclear(reason), _) if report.info.is_none() || !is_current_rejected() => {
                self.problem = Some(format!(
                    "version {version} could not be tested yet: {reason}"
                ));
                self.candidate = Some(next);
                self.act(Action::AwaitTest(version, reason));
            }
            (Verdict::Good | Verdict::Unclear(_), Some(revoked)) => self.reject(revoked),
            (Verdict::Good | Verdict::Unclear(_), None) => self.activate(next, report),
        }
    }

    /// Handles the test result of a version that may replace a rejected one.
    fn fall_back(
        &mut self,
        next: ActiveVersion,
        report: Report,
        may_sign: bool,
        refused: &Refused,
    ) {
        let version = next.version;
        match report.verdict.clone() {
            Verdict::Good if may_sign => {
                self.activate(next, report);
                let is_held = |hold: &Hold| refused.is_held && hold.version == refused.version;
                let prefix = self.hold().filter(is_held).map_or("", |_| "held ");
                let (version, reason) = (refused.version, &refused.reason);
                self.problem = Some(format!("{prefix}version {version} was rejected: {reason}"));
                self.refused = Some(self.after_test());
            }
            Verdict::Refused(reason) if refused.is_held => {
                let problem = format!(
                    "version {version}, written after the hold began, was rejected: {reason}"
                );
                self.give_up_after_hold(version, problem);
                self.act(Action::RejectLater(version, reason));
            }
            Verdict::Unclear(_) => self.test_soon(),
            Verdict::Good | Verdict::Refused(_) => {}
        }
    }

    /// Handles the test result of the key in memory; if it failed, tries another version.
    fn record(&mut self, tested: ActiveVersion, report: Report) {
        let (version, digest, is_proven) = (tested.version, tested.digest(), tested.is_proven());
        let verdict = report.verdict.clone();
        if let Verdict::Unclear(_) = verdict {
            self.test_soon();
            return self.act(Action::Record(tested, report, None));
        }
        self.unanswered = 0;
        self.act(Action::Record(tested, report, Some(self.next_test)));
        if let Verdict::Refused(reason) = verdict {
            if self.hold().is_some() {
                self.try_after_hold((version, digest), reason);
            } else if !is_proven {
                self.try_previous((version, digest), reason);
            }
        }
    }

    /// Tries the version before the newest, if the newest failed its first test after a start.
    fn try_previous(&mut self, refused: (u64, KeyDigest), reason: String) {
        // If an admin has set `use_version`, no other version is tried.
        let is_newest =
            |seen: &&Metadata| seen.use_version().is_none() && seen.current_version == refused.0;
        let newest = self.seen.as_ref().filter(is_newest);
        if let Some(version) = newest.and_then(|seen| seen.before(refused.0)) {
            self.read_fallback(version, refused, reason, false);
        }
    }

    /// Tries a version that was written after the hold began, if the exchange rejects the key in memory during a hold. A
    /// version that existed when the hold began is never tried: the admin rolled back from it.
    fn try_after_hold(&mut self, refused: (u64, KeyDigest), reason: String) {
        let later = self.hold().and_then(|hold| hold.later);
        let tried = self.after_hold.as_ref();
        let is_tried =
            |version| tried.is_some_and(|tried| tried.version == version && self.now < tried.due);
        if let Some(version) = later.filter(|&later| later != refused.0 && !is_tried(later))
            && self.testing.is_none()
            && self.candidate.is_none()
        {
            self.after_hold = Some(AfterHold {
                version,
                due: self.now + self.wait(),
                problem: None,
            });
            self.read_fallback(version, refused, reason, true);
        }
    }

    fn read_fallback(
        &mut self,
        fallback: u64,
        (version, key): (u64, KeyDigest),
        reason: String,
        is_held: bool,
    ) {
        let refused = Refused {
            version,
            key,
            reason,
            is_held,
        };
        self.read(fallback, Reading::Fallback(fallback, refused));
    }

    /// The version that was written after the hold began cannot be used either.
    fn give_up_after_hold(&mut self, version: u64, problem: String) {
        self.problem = Some(problem);
        self.after_hold = Some(AfterHold {
            version,
            due: self.after_test(),
            problem: self.problem.clone(),
        });
    }

    /// Why the version that was written after the hold began does not replace the held one.
    fn problem_after_hold(&self) -> Option<String> {
        let later = self.hold()?.later?;
        let tried = self.after_hold.as_ref()?;
        tried.problem.clone().filter(|_| tried.version == later)
    }

    /// The hold in the metadata of the last poll.
    fn hold(&self) -> Option<Hold> {
        self.seen.as_ref().and_then(Metadata::hold)
    }

    /// Repeats a test that got no answer.
    fn test_soon(&mut self) {
        self.next_test = self.next_test.min(self.now + self.wait());
        self.unanswered += 1;
    }

    /// How long to wait after a test that got no answer.
    fn wait(&self) -> Duration {
        let factor = 2_u32.saturating_pow(self.unanswered);
        TEST_AGAIN.saturating_mul(factor).min(TEST_EVERY)
    }

    /// When to test a key again: [`TEST_EVERY`] plus up to a fifth, so that keys spread out.
    fn after_test(&mut self) -> Duration {
        self.now + TEST_EVERY.mul_f64(1.0 + 0.2 * self.random.f64())
    }
}

fn version_of(of: Option<&ActiveVersion>) -> Option<u64> {
    of.map(|of| of.version)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;
    use zeroize::Zeroizing;

    use super::*;
    use crate::base::secret::{ApiSecret, Passphrase};
    use crate::keyring::usage::Refusal;
    use crate::kucoin::KeyVersion;
    use crate::kucoin::key_info::KeyInfo;

    /// A rotation and its simulated surroundings.
    #[derive(Default)]
    struct World {
        rotation: Rotation,
        now: Duration,
        serving: Option<ActiveVersion>,
        tested: Option<ActiveVersion>,
        /// Versions that cannot be read from Vault, with the error.
        faults: BTreeMap<u64, VaultError>,
        /// While this version is read, the key in memory is wiped.
        wiped_by: Option<u64>,
        /// Whether the keys in Vault were deleted and written again.
        is_recreated: bool,
    }

    /// Metadata from words: `1` is a version, `-1` a deleted one, `~1` one with a deletion time, and `1'` a different
    /// version with the same number; `name=text` is an entry of the custom metadata.
    fn metadata(words: &str) -> Metadata {
        let (mut newest, mut versions, mut notes) = (0, BTreeMap::new(), BTreeMap::new());
        for word in words.split_whitespace() {
            if let Some((name, text)) = word.split_once('=') {
                notes.insert(name, text.replace('@', " since "));
                continue;
            }
            let number: u64 = word.trim_matches(['-', '~', '\'']).parse().unwrap();
            let created = if word.ends_with('\'') { "2" } else { "1" };
            let deletion = if word.starts_with(['-', '~']) {
                "3"
            } else {
                ""
            };
            let version =
                json!({ "created_time": created, "deletion_time": deletion, "destroyed": false });
            versions.insert(number.to_string(), version);
            newest = newest.max(number);
        }
        let all =
            json!({ "current_version": newest, "versions": versions, "custom_metadata": notes });
        serde_json::from_value(all).unwrap()
    }

    fn version(version: u64, is_recreated: bool) -> ActiveVersion {
        let text = |text: &str| Zeroizing::new(text.to_owned());
        let secret = ApiSecret::new(text("fake-secret"));
        let passphrase = Passphrase::new(text("fake-pass"));
        let id = text(&format!("fake-{version}-{is_recreated}"));
        ActiveVersion {
            key: Key::new(id, &secret, &passphrase, KeyVersion::V3, None).unwrap(),
            usage: Arc::default(),
            version,
        }
    }

    fn report(verdict: Verdict) -> Report {
        Report {
            verdict,
            info: None,
            findings: Vec::new(),
        }
    }

    impl World {
        /// Handles one step, and returns the resulting actions as text.
        fn run(&mut self, step: &str) -> String {
            let (kind, rest) = step.split_once(' ').unwrap_or((step, ""));
            let mut done = Vec::new();
            match kind {
                "vault" => {
                    self.is_recreated |= rest.contains('\'');
                    self.handle(Event::Metadata(Ok(metadata(rest)), false), &mut done);
                }
                "refresh" => self.handle(Event::Metadata(Ok(metadata(rest)), true), &mut done),
                "silent" => {
                    let error = VaultError::Outage("silent".into());
                    self.handle(Event::Metadata(Err(error), false), &mut done);
                }
                "denied" => {
                    self.handle(Event::Metadata(Err(VaultError::Denied), false), &mut done);
                }
                "good" | "refused" | "unclear" => {
                    let mut report = report(match kind {
                        "good" => Verdict::Good,
                        "refused" => Verdict::Refused("bad".to_owned()),
                        _ => Verdict::Unclear("hm".to_owned()),
                    });
                    report.info = (rest == "known").then(|| {
                        Arc::new(KeyInfo {
                            uid: None,
                            is_master: true,
                            sub_name: None,
                            site: None,
                            permissions: Vec::new(),
                            ip_whitelist: Vec::new(),
                            version: None,
                            created_at_ms: None,
                            expires_at_ms: None,
                            third_party_app: None,
                            unread: Vec::new(),
                        })
                    });
                    let revoked = (rest == "revoked").then(|| "revoked".to_owned());
                    let tested = self.tested.take().unwrap();
                    self.handle(Event::Tested(tested, report, revoked), &mut done);
                }
                // The exchange accepts or rejects a request of a bot.
                "accepted" => self.serving.as_ref().unwrap().usage.accepted(1),
                "rejected" => {
                    self.serving.as_ref().unwrap().usage.refused(Refusal {
                        code: rest.to_owned(),
                        advice: "advice".to_owned(),
                        at_ms: 2,
                    });
                }
                "wait" => self.now += Duration::from_secs(rest.parse().unwrap()),
                // The keyring wipes the key for its age, or an admin revokes it.
                "wiped" => {
                    self.serving = None;
                    self.rotation.forget();
                    assert!(self.rotation.candidate.is_none(), "as old as the key");
                }
                "revoked" => self.serving = None,
                fault => {
                    if fault == "wiping" {
                        self.wiped_by = Some(rest.parse().unwrap());
                    }
                    let error = match fault {
                        "gone" => VaultError::Gone("gone".to_owned()),
                        "outage" | "wiping" => VaultError::Outage("outage".into()),
                        "unusable" => VaultError::Unusable("unusable".to_owned()),
                        _ => panic!("{fault}"),
                    };
                    self.faults.insert(rest.parse().unwrap(), error);
                }
            }
            self.handle(Event::Idle, &mut done);
            assert_eq!(self.rotation.is_testing(), self.tested.is_some(), "{step}");
            assert!(self.rotation.serving.is_none(), "key is kept: {step}");
            let problem = self
                .rotation
                .problem()
                .map(|problem| format!("[{problem}]"));
            done.extend(problem);
            done.join(", ")
        }

        fn handle(&mut self, event: Event, done: &mut Vec<String>) {
            let mut event = Some(event);
            while let Some(next) = event.take() {
                let actions = self.rotation.step(self.now, self.serving.clone(), next);
                if !self.rotation.is_testing() {
                    self.tested = None;
                }
                for action in actions {
                    assert!(event.is_none(), "an action follows a read");
                    done.push(match action {
                        Action::Activate(next) => {
                            let text = format!("use {}", next.version);
                            self.serving = Some(next);
                            text
                        }
                        Action::ActivateUntested(next) => {
                            let text = format!("use {} untested", next.version);
                            self.serving = Some(next);
                            self.rotation.recall(None);
                            text
                        }
                        Action::AwaitTest(version, _) => format!("await {version}"),
                        Action::Confirm if self.serving.is_none() => continue,
                        Action::Confirm => "confirm".to_owned(),
                        Action::Evict(reason) => {
                            assert!(self.rotation.candidate.is_none(), "{reason}");
                            self.serving = None;
                            format!("evict: {reason}")
                        }
                        Action::CheckExists(number) | Action::Read(number) => {
                            if self.wiped_by == Some(number) {
                                self.serving = None;
                            }
                            let found = self.faults.get(&number).cloned();
                            let found =
                                found.map_or_else(|| Ok(version(number, self.is_recreated)), Err);
                            event = Some(Event::Version(found));
                            if matches!(action, Action::Read(_)) {
                                format!("read {number}")
                            } else {
                                format!("check {number}")
                            }
                        }
                        Action::MarkOutage(error) => format!("outage: {error}"),
                        Action::Note(Noted { restricted, hold }, _) => match (restricted, hold) {
                            (None, None) => continue,
                            (Some(_), _) => "restrict".to_owned(),
                            (None, Some(hold)) => format!("held {}", hold.version),
                        },
                        Action::Record(of, _, Some(_)) => format!("record {}", of.version),
                        Action::Record(of, _, None) => format!("no answer on {}", of.version),
                        Action::RejectLater(version, _) => format!("reject later {version}"),
                        Action::RejectTested(next, reason) => {
                            format!("reject {}: {reason}", next.version)
                        }
                        Action::RejectUnusable(serving, _) => format!("keep {serving}"),
                        Action::TestCandidate(next) => {
                            let text = format!("test {}", next.version);
                            self.tested = Some(next);
                            text
                        }
                        Action::TestServing(serving) => {
                            let text = format!("test serving {}", serving.version);
                            self.tested = Some(serving);
                            text
                        }
                    });
                }
            }
        }
    }

    /// Steps and the expected actions, with the reported problem in brackets.
    type Story<'a> = &'a [(&'a str, &'a str)];

    const START: Story = &[
        ("vault 1", "read 1, use 1 untested, test serving 1"),
        ("good", "record 1"),
        ("accepted", ""),
        ("vault 1", "confirm"),
    ];

    #[track_caller]
    fn check(start: Story, stories: &[Story]) {
        for story in stories {
            let mut world = World::default();
            for (step, done) in start.iter().chain(*story) {
                assert_eq!(world.run(step), *done, "after: {step}, in: {story:#?}");
            }
        }
    }

    #[test]
    fn newest_version_is_used_at_once_after_a_start_and_the_previous_one_if_it_is_rejected() {
        let second = ("vault 1 2", "read 2, use 2 untested, test serving 2");
        let refused = ("refused", "record 2, read 1, test 1");
        let back = ("good", "use 1, record 1, [version 2 was rejected: bad]");
        let stories: &[Story] = &[
            &[("silent", "outage: silent"), second],
            &[("vault", "evict: Vault has no version of it yet"), second],
            &[("vault 1 ~2", "read 2, use 2 untested, test serving 2")],
            &[
                second,
                refused,
                back,
                ("vault 1 2", "confirm, [version 2 was rejected: bad]"),
                ("wait 599", "[version 2 was rejected: bad]"),
                ("vault 1 2", "confirm, [version 2 was rejected: bad]"),
                ("wait 122", "test serving 1, [version 2 was rejected: bad]"),
                (
                    "vault 1 2",
                    "read 2, confirm, test 2, [version 2 was rejected: bad]",
                ),
                ("good", "use 2, record 2"),
            ],
            &[second, refused, ("refused", ""), ("vault 1 2", "confirm")],
            &[
                second,
                refused,
                ("unclear", ""),
                ("wait 4", ""),
                ("wait 1", "test serving 2"),
                refused,
                back,
            ],
            &[
                second,
                refused,
                ("good revoked", ""),
                ("vault 1 2", "confirm"),
            ],
            &[second, ("unusable 1", ""), ("refused", "record 2, read 1")],
            // A different key has the number now: the test of the old fallback has no effect.
            &[
                second,
                refused,
                ("revoked", ""),
                ("vault 1' 2'", "read 2, use 2 untested"),
                ("good", "test serving 2"),
            ],
            // It has signed for a bot, so the rejection may be temporary.
            &[second, ("accepted", ""), ("refused", "record 2")],
            &[
                ("vault -1 2", "read 2, use 2 untested, test serving 2"),
                ("refused", "record 2"),
            ],
            // An admin has set it with `use_version`.
            &[
                (
                    "vault 1 2 use_version=2",
                    "read 2, use 2 untested, test serving 2",
                ),
                ("refused", "record 2"),
            ],
        ];
        check(&[], stories);
    }

    #[test]
    fn new_version_is_used_once_the_exchange_accepts_it() {
        let second = ("vault 1 2", "read 2, confirm, test 2");
        let waits = "await 2, [version 2 could not be tested yet: hm]";
        let again = "confirm, test 2, [version 2 could not be tested yet: hm]";
        let refused = "reject 2: bad, [version 2 was rejected: bad]";
        let stories: &[Story] = &[
            &[
                second,
                ("vault 1 2", "confirm"),
                ("good", "use 2, record 2"),
                ("vault 1 2", "confirm"),
            ],
            &[
                second,
                ("refused", refused),
                ("vault 1 2", "confirm, [version 2 was rejected: bad]"),
                (
                    "refresh 1 2",
                    "read 2, confirm, test 2, [version 2 was rejected: bad]",
                ),
                ("refused", refused),
                (
                    "vault 1 2 3",
                    "read 3, confirm, test 3, [version 2 was rejected: bad]",
                ),
                ("good", "use 3, record 3"),
            ],
            &[
                second,
                ("refused", refused),
                ("wait 721", "test serving 1, [version 2 was rejected: bad]"),
                (
                    "vault 1 2",
                    "read 2, confirm, test 2, [version 2 was rejected: bad]",
                ),
            ],
            &[
                second,
                ("unclear", waits),
                ("vault 1 2", again),
                ("good", "use 2, record 2"),
            ],
            // Facts about the new key are enough to replace one with rejected credentials.
            &[
                second,
                (
                    "unclear known",
                    "await 2, [version 2 could not be tested yet: hm]",
                ),
                ("rejected 400006", "[version 2 could not be tested yet: hm]"),
                ("vault 1 2", again),
                (
                    "unclear known",
                    "await 2, [version 2 could not be tested yet: hm]",
                ),
                ("rejected 400003", "[version 2 could not be tested yet: hm]"),
                ("vault 1 2", again),
                ("unclear", waits),
                ("vault 1 2", again),
                ("unclear known", "use 2, record 2"),
            ],
            &[
                second,
                ("good revoked", "keep 1, confirm, [revoked]"),
                ("vault 1 2", "confirm, [revoked]"),
            ],
            // A newer version replaces a candidate whose test hangs; a hold drops the candidate.
            &[second, ("vault 1 2 3", "read 3, confirm, test 3")],
            &[second, ("vault 1 -2 3", "read 3, confirm, test 3")],
            &[second, ("vault 1 2 use_version=1", "held 1, confirm")],
        ];
        check(START, stories);
    }

    #[test]
    fn unusable_version_does_not_replace_a_working_key_and_is_read_once() {
        check(
            START,
            &[&[
                ("unusable 2", ""),
                ("vault 1 2", "read 2, keep 1, confirm, [unusable]"),
                ("vault 1 2", "confirm, [unusable]"),
                ("refresh 1 2", "read 2, keep 1, confirm, [unusable]"),
                ("vault 1 2 3", "read 3, confirm, test 3, [unusable]"),
                ("good", "use 3, record 3"),
            ]],
        );
        check(
            START,
            &[&[
                ("outage 2", ""),
                ("vault 1 2", "read 2, outage: outage"),
                ("vault 1 2", "read 2, outage: outage"),
                ("vault 1", "confirm"),
            ]],
        );
        check(
            &[("unusable 1", "")],
            &[&[
                ("vault 1", "read 1, evict: unusable"),
                ("vault 1", ""),
                ("refresh 1", "read 1, evict: unusable"),
                ("vault 1 2", "read 2, use 2 untested, test serving 2"),
            ]],
        );
        let missing = "its custom metadata has use_version=7, but Vault has no such version; set another with `credbroker keys rollback`";
        let mut world = World::default();
        for (step, _) in START {
            world.run(step);
        }
        let kept = format!("keep 1, confirm, [{missing}]");
        assert_eq!(world.run("vault 1 use_version=7"), kept);
        assert_eq!(world.run("vault 1"), "confirm");
    }

    #[test]
    fn deleted_version_is_replaced_without_a_gap_or_evicted() {
        let stories: &[Story] = &[
            &[("vault -1 2", "read 2, use 2 untested, test serving 2")],
            &[
                ("vault 1 2", "read 2, confirm, test 2"),
                ("vault -1 2", "read 2, use 2 untested, test serving 2"),
            ],
            // Deleted with all its versions, and written again.
            &[("vault 1'", "read 1, use 1 untested, test serving 1")],
            &[
                ("gone 1", ""),
                (
                    "vault -1",
                    "read 1, evict: version 1 has been deleted in Vault, evict: gone",
                ),
                ("vault -1", "read 1, evict: gone"),
            ],
            &[
                ("wiping 2", ""),
                (
                    "vault -1 2",
                    "read 2, evict: version 1 has been deleted in Vault, outage: outage",
                ),
            ],
            &[
                ("outage 2", ""),
                (
                    "vault -1 2",
                    "read 2, evict: version 1 has been deleted in Vault, outage: outage",
                ),
            ],
            &[
                ("unusable 2", ""),
                (
                    "vault -1 2",
                    "read 2, evict: version 1 has been deleted in Vault, evict: unusable",
                ),
            ],
            // The broker never returns to an older version by itself.
            &[
                ("vault 1 2", "read 2, confirm, test 2"),
                ("good", "use 2, record 2"),
                ("gone 2", ""),
                (
                    "vault 1 -2",
                    "read 2, evict: version 2 has been deleted in Vault, evict: gone",
                ),
                ("vault 1 -2 3", "read 3, use 3 untested, test serving 3"),
            ],
            &[(
                "denied",
                "evict: Vault denied the broker access (403); check the broker's Vault policy",
            )],
            &[
                (
                    "vault 1 state=off",
                    "evict: disabled in Vault (state=off in its custom metadata)",
                ),
                (
                    "vault 1 state=off",
                    "evict: disabled in Vault (state=off in its custom metadata)",
                ),
                (
                    "vault 1 state=odd",
                    "restrict, read 1, use 1 untested, test serving 1",
                ),
                ("vault 1", "confirm"),
            ],
        ];
        check(START, stories);
    }

    #[test]
    fn version_with_a_deletion_time_is_checked_at_each_poll() {
        let start: Story = &[
            ("vault ~1", "read 1, use 1 untested, test serving 1"),
            ("good", "record 1"),
            ("vault ~1", "check 1, confirm"),
        ];
        let second = ("vault ~1 2", "check 1, read 2, confirm, test 2");
        let stories: &[Story] = &[
            &[("gone 1", ""), ("vault ~1", "check 1, evict: gone")],
            &[
                second,
                ("unusable 1", ""),
                ("vault ~1 2", "check 1, confirm"),
                ("gone 1", ""),
                (
                    "vault ~1 2",
                    "check 1, evict: version 1 has been deleted in Vault, read 2, use 2 untested, test serving 2",
                ),
            ],
            &[
                second,
                ("outage 1", ""),
                ("vault ~1 2", "check 1, outage: outage"),
                ("good", "use 2, record 2"),
            ],
            &[("outage 1", ""), ("vault ~1", "check 1, outage: outage")],
        ];
        check(start, stories);
    }

    #[test]
    fn held_version_is_replaced_by_a_later_one_only_if_the_exchange_rejects_it() {
        // Version 2 was the newest when the hold on version 1 began.
        let later = "vault 1 2 3 use_version=1 hold=1@2";
        let hold: Story = &[
            (
                "vault 1 2 use_version=1 hold=1@2",
                "held 1, read 1, use 1 untested, test serving 1",
            ),
            ("good", "record 1"),
            ("accepted", ""),
            ("vault 1 2 use_version=1 hold=1@2", "held 1, confirm"),
        ];
        let stories: &[Story] = &[
            // A version from before the hold is never tried.
            &[
                ("rejected 400003", ""),
                ("vault 1 2 use_version=1 hold=1@2", "held 1, confirm"),
                ("wait 721", "test serving 1"),
                ("refused", "record 1"),
            ],
            &[
                (later, "held 1, confirm"),
                ("rejected 400006", ""),
                (later, "held 1, confirm"),
                ("rejected 400003", ""),
                (later, "held 1, confirm, read 3, test 3"),
                (
                    "good",
                    "use 3, record 3, [held version 1 was rejected: advice]",
                ),
                (
                    later,
                    "held 1, confirm, [held version 1 was rejected: advice]",
                ),
                (
                    "wait 721",
                    "test serving 3, [held version 1 was rejected: advice]",
                ),
                ("good", "record 3, [held version 1 was rejected: advice]"),
                // The held version is tried again.
                (
                    later,
                    "held 1, read 1, confirm, test 1, [held version 1 was rejected: advice]",
                ),
                ("good", "use 1, record 1"),
            ],
            &[
                (later, "held 1, confirm"),
                ("wait 721", "test serving 1"),
                ("refused", "record 1, read 3, test 3"),
                (
                    "refused",
                    "reject later 3, [version 3, written after the hold began, was rejected: bad]",
                ),
                (
                    later,
                    "held 1, confirm, [version 3, written after the hold began, was rejected: bad]",
                ),
                (
                    "rejected 400003",
                    "[version 3, written after the hold began, was rejected: bad]",
                ),
                (
                    later,
                    "held 1, confirm, [version 3, written after the hold began, was rejected: bad]",
                ),
                (
                    "refresh 1 2 3 use_version=1 hold=1@2",
                    "held 1, confirm, read 3, test 3",
                ),
                ("good revoked", "test serving 1"),
            ],
            &[
                ("unusable 3", ""),
                ("rejected 400003", ""),
                (later, "held 1, confirm, read 3, [unusable]"),
                (later, "held 1, confirm, [unusable]"),
                // An even newer version has not been tried.
                (
                    "vault 1 2 3 4 use_version=1 hold=1@2",
                    "held 1, confirm, read 4, test 4",
                ),
            ],
            // After an outage of Vault, it is tried again soon.
            &[
                ("outage 3", ""),
                ("rejected 400003", ""),
                (later, "held 1, confirm, read 3"),
                (later, "held 1, confirm"),
                ("wait 5", ""),
                (later, "held 1, confirm, read 3"),
            ],
            // Without `hold` (`use_version` set by hand) no version counts as later.
            &[
                ("rejected 400003", ""),
                ("vault 1 2 3 use_version=1", "held 1, confirm"),
            ],
        ];
        check(hold, stories);
    }

    #[test]
    fn admin_rolls_back_to_an_older_version_and_forward_again() {
        check(
            &[],
            &[&[
                ("vault 1 2", "read 2, use 2 untested, test serving 2"),
                ("good", "record 2"),
                (
                    "vault 1 2 use_version=1 hold=1@2",
                    "held 1, read 1, confirm, test 1",
                ),
                ("good", "use 1, record 1"),
                ("vault 1 2 use_version=1 hold=1@2", "held 1, confirm"),
                ("vault 1 2", "read 2, confirm, test 2"),
                ("good", "use 2, record 2"),
            ]],
        );
    }

    #[test]
    fn wiping_the_key_drops_its_candidate_and_revoking_it_does_not() {
        let second = ("vault 1 2", "read 2, confirm, test 2");
        check(
            START,
            &[&[
                second,
                ("wiped", ""),
                ("silent", "outage: silent"),
                ("vault 1 2", "read 2, use 2 untested, test serving 2"),
            ]],
        );
        check(
            START,
            &[&[
                ("revoked", ""),
                ("unusable 1", ""),
                ("vault 1", "read 1, evict: unusable"),
                ("vault 1", ""),
            ]],
        );
        // The test of a candidate finishes while no key is in memory.
        check(
            START,
            &[&[second, ("revoked", ""), ("good", "use 2, record 2")]],
        );
        check(
            START,
            &[&[second, ("revoked", ""), ("good revoked", "evict: revoked")]],
        );
    }

    #[test]
    fn wait_doubles_after_each_test_without_an_answer() {
        let mut world = World::default();
        world.run("vault 1");
        for wait in [5, 10, 20, 40, 80, 160, 320, 600, 600] {
            assert_eq!(world.run("unclear"), "no answer on 1");
            assert_eq!(world.run(&format!("wait {}", wait - 1)), "", "{wait}");
            assert_eq!(world.run("wait 1"), "test serving 1", "{wait}");
        }
        assert_eq!(world.run("good"), "record 1");
        assert_eq!(world.run("wait 599"), "");
        assert_eq!(world.run("wait 122"), "test serving 1");
        assert_eq!(world.run("unclear"), "no answer on 1");
        assert_eq!(world.run("wait 5"), "test serving 1");
    }
}
