//! Decides which version of a key signs: by what Vault shows, and by what the exchange says of its versions.
//!
//! A state machine for one key, without I/O, tasks or a clock. [`super::refresh`] passes in one [`Event`] after the other,
//! and does what the returned [`Action`]s say before it passes in the next one.
//!
//! Vault's word (404, or 403 twice to a good token, or `state=disabled`) evicts at once; a `state` that is neither active
//! nor disabled refuses what is risk-increasing. No answer, or an answer that is a fault, changes nothing: the key in
//! memory stays in use, within the bounds of its account.
//!
//! Another version takes the place of the one in memory once the exchange has taken requests that it signed. One that
//! the exchange refuses changes nothing, and the reason shows. Only after a start there is nothing to compare with: the
//! newest version serves at once, and if the exchange turns out to refuse it, the version before it is tried.
//!
//! While an admin holds a version in use (`keys rollback`), it alone serves. If the exchange refuses it, a version that was
//! written after the hold began is tried in its place, and never an older one.

use std::mem;
use std::sync::Arc;
use std::time::Duration;

use super::Noted;
use super::key_test::{Report, Verdict};
use super::usage::Usage;
use crate::kucoin::Key;
use crate::kucoin::code::CREDENTIALS_REFUSED;
use crate::restrictions::KeyDigest;
use crate::vault::{Hold, Metadata, NotedState, VaultError, unknown_state};

/// Why there is no key where Vault refuses it to a token that it accepts.
const DENIED: &str = "Vault refuses it to the broker (403); check the broker's policy";

/// How often a key is tested in the background at most. A test has weight 20 of the 2000 that an account has for such
/// questions in 30 s.
const TEST_EVERY: Duration = Duration::from_secs(600);

/// First wait after a background test that had no answer; each one in a row doubles it, up to [`TEST_EVERY`].
const TEST_AGAIN: Duration = Duration::from_secs(5);

/// A version of a key, and what the exchange has said about it.
#[derive(Clone, Debug)]
pub(super) struct Serving {
    pub(super) key: Arc<Key>,
    pub(super) usage: Arc<Usage>,
    pub(super) version: u64,
}

impl Serving {
    pub(super) fn digest(&self) -> KeyDigest {
        KeyDigest(self.key.id_sha256())
    }

    /// Whether the exchange has taken a request that it signed.
    pub(super) fn is_proven(&self) -> bool {
        self.usage.accepted_ms().is_some()
    }

    /// What the bot was told, where the exchange refuses what it signs.
    fn refusal(&self) -> Option<String> {
        let refusal = self.usage.refusal()?;
        let is_dead = CREDENTIALS_REFUSED.contains(&refusal.code.as_str());
        is_dead.then_some(refusal.advice)
    }
}

/// What has happened.
#[derive(Debug)]
pub(super) enum Event {
    /// All that earlier events called for is done.
    Idle,
    /// Vault was asked for the metadata; maybe (`true`) by somebody who wants a refused version tried once more.
    Metadata(Result<Metadata, VaultError>, bool),
    /// The exchange was asked about a key, which is revoked by now where there is a reason.
    Tested(Serving, Report, Option<String>),
    /// What came of [`Action::Read`] or [`Action::LookFor`]. A version that may serve and is revoked is unusable.
    Version(Result<Serving, VaultError>),
}

/// What is to be done, in this order.
#[derive(Debug)]
pub(super) enum Action {
    /// This version signs from now on, and no other.
    Activate(Serving),
    /// The same, before any test: the keyring may recall when one is due, and whoever is refused meanwhile waits.
    ActivateUntested(Serving),
    /// The exchange has not said whether it takes this new version.
    AwaitTest(u64, String),
    /// Vault has vouched for the key in memory, if there is one.
    Confirm,
    /// There is no key for us.
    Evict(String),
    /// See whether Vault still has a version; always the last action.
    LookFor(u64),
    /// Vault has given no usable answer.
    MarkOutage(VaultError),
    /// Keep what the metadata say, before the key signs by them; and the number of the newest version.
    Note(Noted, u64),
    /// Read a version that may serve from Vault; always the last action.
    Read(u64),
    /// Keep what a test said of the key in memory, and when the next one is due; none where that had no answer.
    Record(Serving, Report, Option<Duration>),
    /// The exchange refuses this new version; the one in memory stays in use.
    Refuse(Serving, String),
    /// The exchange refuses this version, which was written after the hold began; the held one stays in use.
    RefuseLater(u64, String),
    /// The version that Vault wants in use can never serve; this one, which is in memory, stays in use.
    Reject(u64, String),
    /// Have a version tested that may serve, with every scope, in place of the test that is under way.
    TestCandidate(Serving),
    /// Have the key in memory tested.
    TestServing(Serving),
}

/// Decides which version of a key signs, and keeps what is known about its versions.
#[derive(Debug, Default)]
pub(super) struct Rotation {
    /// Time since boot.
    now: Duration,
    /// The key in memory, while an event is handled. Not kept any longer, so that a key that is wiped is gone.
    serving: Option<Serving>,
    /// What the event at hand calls for.
    actions: Vec<Action>,
    /// The metadata that Vault has shown last; none: whatever it shows next is read.
    seen: Option<Metadata>,
    /// Whether the wanted version can never do so: it is no key, or it is revoked.
    is_unusable: bool,
    /// Whether a version that has been refused is to be tried once more.
    is_fresh: bool,
    /// The wanted version, as long as the exchange has not said whether it takes it.
    candidate: Option<Serving>,
    /// When the wanted version, and that the exchange has refused, is to be tried again.
    refused: Option<Duration>,
    /// The version that was tried in place of a held one.
    after_hold: Option<AfterHold>,
    /// When the key in memory is to be tested again.
    next_test: Duration,
    /// How many tests in a row had no answer.
    unanswered: u32,
    /// What the version that is being read is for.
    reading: Option<Reading>,
    /// What is being tested.
    testing: Option<Testing>,
    /// What shows beside the key in memory: what is wrong with a version that is not used.
    problem: Option<String>,
    /// Spreads tests of many keys out.
    random: fastrand::Rng,
}

/// A version that was tried in place of a held one, which the exchange refuses.
#[derive(Debug)]
struct AfterHold {
    version: u64,
    /// When it may be tried again.
    due: Duration,
    /// Why the exchange refuses it too, or why it is no key.
    problem: Option<String>,
}

/// What a version is read for.
#[derive(Debug)]
enum Reading {
    /// The version in memory, the last one here, may have deleted itself, of which the metadata say nothing then.
    Expiring(Metadata, u64, u64),
    /// It may serve in place of the one in memory.
    Instead(u64, Refused),
    /// The version in memory, this one, has been deleted in Vault.
    Replacement(Metadata, u64),
    /// The wanted version has not been read yet, or is to be tried again.
    Wanted(Metadata),
    /// The wanted version may have deleted itself.
    WantedExpiring(Metadata, u64),
}

/// What is being tested.
#[derive(Debug)]
enum Testing {
    /// [`Rotation::candidate`].
    Candidate,
    /// A version that may serve in place of the one in memory.
    Instead(Refused),
    /// The key in memory.
    Serving,
}

/// The version in memory, which the exchange refuses.
#[derive(Debug)]
struct Refused {
    version: u64,
    key: KeyDigest,
    reason: String,
    /// Whether a version is held in use, and one that was written after that began is tried; else it is the one before.
    is_held: bool,
}

impl Rotation {
    /// What to do about an event, at `now` (time since boot), while `serving` is in memory.
    pub(super) fn step(
        &mut self,
        now: Duration,
        serving: Option<Serving>,
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
                Some(Testing::Instead(refused)) => {
                    let is_it =
                        |it: &Serving| (it.version, it.digest()) == (refused.version, refused.key);
                    let may_serve = revoked.is_none() && self.serving.as_ref().is_some_and(is_it);
                    self.fall_back(tested, report, may_serve, &refused);
                }
                Some(Testing::Serving) => self.record(tested, report),
                None => {}
            },
            Event::Version(answer) => self.take(answer),
        }
        self.serving = None;
        mem::take(&mut self.actions)
    }

    /// The keyring recalls when the key that has just been activated is to be tested again; else that is at once.
    pub(super) fn recall(&mut self, due: Option<Duration>) {
        self.next_test = due.unwrap_or_default();
    }

    /// The key is not in memory any more: a candidate goes with it, and what Vault showed last is read again.
    pub(super) fn forget(&mut self) {
        self.seen = None;
        self.forget_candidate();
        self.testing = None;
        self.problem = None;
    }

    /// Whether Vault has shown the key, and it has not been forgotten since.
    pub(super) fn has_seen(&self) -> bool {
        self.seen.is_some()
    }

    /// Whether a test is under way; any event may end it.
    pub(super) fn is_testing(&self) -> bool {
        self.testing.is_some()
    }

    /// What is wrong with a version that is not used.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.clone()
    }

    /// Compares what Vault shows with what it showed before.
    fn compare(&mut self, metadata: Metadata) {
        let restricted = match metadata.state() {
            NotedState::Active => None,
            NotedState::Disabled(word) => {
                return self.evict(format!("its metadata in Vault says state={word}"));
            }
            NotedState::Unknown(word) => Some(format!(
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
        let has_lost = |seen: &Metadata| serving.filter(|&it| metadata.has_taken_away(seen, it));
        if let Some(lost) = self.seen.as_ref().and_then(has_lost) {
            // What Vault has instead serves without a test, and without a gap.
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
            (Ok(wanted), Some(it)) if it != wanted && metadata.deletes_itself(it) => {
                self.reading = Some(Reading::Expiring(metadata, wanted, it));
                self.act(Action::LookFor(it));
            }
            (Ok(wanted), _) => self.choose(metadata, wanted),
        }
    }

    /// Reads the wanted version, unless all is as it was.
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
        } else if metadata.deletes_itself(wanted) {
            self.reading = Some(Reading::WantedExpiring(metadata, wanted));
            self.act(Action::LookFor(wanted));
        } else {
            self.keep(metadata, wanted);
        }
    }

    /// All is as it was.
    fn keep(&mut self, metadata: Metadata, wanted: u64) {
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

    /// Decides about a version that was read, or was to be.
    fn take(&mut self, answer: Result<Serving, VaultError>) {
        let Some(reading) = self.reading.take() else {
            return;
        };
        match (reading, answer) {
            (Reading::Expiring(metadata, wanted, it), Err(VaultError::Gone(_))) => {
                self.evict_deleted(it);
                self.choose(metadata, wanted);
            }
            (Reading::Expiring(metadata, wanted, _), Ok(_) | Err(VaultError::Unusable(_))) => {
                self.choose(metadata, wanted);
            }
            (Reading::Instead(_, refused), Ok(next)) => self.test(next, Testing::Instead(refused)),
            (Reading::Instead(version, refused), Err(VaultError::Unusable(problem)))
                if refused.is_held =>
            {
                self.give_up_after_hold(version, problem);
            }
            (Reading::Instead(..), Err(_)) => {}
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
            (Reading::WantedExpiring(metadata, wanted), Ok(_)) => self.keep(metadata, wanted),
            (
                Reading::Wanted(metadata) | Reading::WantedExpiring(metadata, _),
                Err(VaultError::Unusable(reason)),
            ) => {
                // Seen, so that a broken version is read once and not at every poll.
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

    /// The version in memory has been deleted in Vault, and nothing else can serve.
    fn lose(&mut self, version: u64, error: VaultError) {
        self.evict_deleted(version);
        self.fail(error);
    }

    /// The wanted version cannot: a half-written one must not take a working key away.
    fn reject(&mut self, reason: String) {
        self.forget_candidate();
        let is_there = |version: &u64| self.seen.as_ref().is_some_and(|seen| seen.has(*version));
        if let Some(version) = version_of(self.serving.as_ref()).filter(is_there) {
            self.problem = Some(reason.clone());
            self.act(Action::Reject(version, reason));
            self.act(Action::Confirm);
        } else {
            let seen = self.seen.take();
            self.evict(reason);
            // It stays so until Vault shows something else: no need to read it at every poll.
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

    /// What Vault wants now is something else.
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

    /// Tests the candidate, unless that is under way; where there is nothing better, it serves at once.
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

    fn activate(&mut self, next: Serving, report: Report) {
        self.problem = None;
        self.next_test = self.after_test();
        self.act(Action::Activate(next.clone()));
        self.act(Action::Record(next, report, Some(self.next_test)));
    }

    fn activate_untested(&mut self, next: Serving) {
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

    fn test(&mut self, next: Serving, testing: Testing) {
        self.testing = Some(testing);
        self.act(Action::TestCandidate(next));
    }

    /// Tests the key in memory now and then, and at once when it is new.
    fn test_if_due(&mut self) {
        if self.testing.is_some() || self.now < self.next_test {
            return;
        }
        if let Some(serving) = self.serving.clone() {
            self.next_test = self.after_test();
            self.testing = Some(Testing::Serving);
            self.act(Action::TestServing(serving));
        }
    }

    /// Decides about the wanted version.
    fn judge(&mut self, next: Serving, report: Report, revoked: Option<String>) {
        self.candidate = None;
        let version = next.version;
        let is_dead = || self.serving.as_ref().and_then(Serving::refusal).is_some();
        match (report.verdict.clone(), revoked) {
            (Verdict::Refused(reason), _) => {
                self.problem = Some(format!("version {version} is refused: {reason}"));
                self.refused = Some(self.after_test());
                self.act(Action::Refuse(next, reason));
            }
            // Where the exchange has told what it is, it takes what it signs; that is enough if the one in memory is dead.
            (Verdict::Unclear(reason), _) if report.info.is_none() || !is_dead() => {
                self.problem = Some(format!(
                    "version {version} is waiting for its test: {reason}"
                ));
                self.candidate = Some(next);
                self.act(Action::AwaitTest(version, reason));
            }
            (Verdict::Good | Verdict::Unclear(_), Some(revoked)) => self.reject(revoked),
            (Verdict::Good | Verdict::Unclear(_), None) => self.activate(next, report),
        }
    }

    /// Decides about a version that may serve in place of one that the exchange refuses.
    fn fall_back(&mut self, next: Serving, report: Report, may_serve: bool, refused: &Refused) {
        let version = next.version;
        match report.verdict.clone() {
            Verdict::Good if may_serve => {
                self.activate(next, report);
                let is_it = |hold: &Hold| refused.is_held && hold.version == refused.version;
                let hold = self.hold().filter(is_it);
                let how = hold.map_or("", |_| ", which is held in use,");
                let (version, reason) = (refused.version, &refused.reason);
                self.problem = Some(format!("version {version}{how} is refused: {reason}"));
                self.refused = Some(self.after_test());
            }
            Verdict::Refused(reason) if refused.is_held => {
                let problem = format!(
                    "version {version} was written after the hold began, and is refused: {reason}"
                );
                self.give_up_after_hold(version, problem);
                self.act(Action::RefuseLater(version, reason));
            }
            Verdict::Unclear(_) => self.test_soon(),
            Verdict::Good | Verdict::Refused(_) => {}
        }
    }

    /// Keeps what a test said of the key in memory, and looks for another one where the exchange refuses it.
    fn record(&mut self, tested: Serving, report: Report) {
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
                self.try_before((version, digest), reason);
            }
        }
    }

    /// After a start whose newest version the exchange refuses: the one before it may be good.
    fn try_before(&mut self, refused: (u64, KeyDigest), reason: String) {
        // An admin who has named a version wants no other one.
        let is_newest =
            |seen: &&Metadata| seen.use_version().is_none() && seen.current_version == refused.0;
        let newest = self.seen.as_ref().filter(is_newest);
        if let Some(version) = newest.and_then(|seen| seen.before(refused.0)) {
            self.read_instead(version, refused, reason, false);
        }
    }

    /// The exchange refuses the key in memory while an admin holds a version in use: one that was written after that may be
    /// good. An older one never follows by itself, since the admin went back past it.
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
            self.read_instead(version, refused, reason, true);
        }
    }

    fn read_instead(
        &mut self,
        instead: u64,
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
        self.read(instead, Reading::Instead(instead, refused));
    }

    /// The version that was written after the hold began is no better than the held one.
    fn give_up_after_hold(&mut self, version: u64, problem: String) {
        self.problem = Some(problem);
        self.after_hold = Some(AfterHold {
            version,
            due: self.after_test(),
            problem: self.problem.clone(),
        });
    }

    /// Why the version that was written after the hold began does not serve in place of the held one.
    fn problem_after_hold(&self) -> Option<String> {
        let later = self.hold()?.later?;
        let tried = self.after_hold.as_ref()?;
        tried.problem.clone().filter(|_| tried.version == later)
    }

    /// What an admin holds in use, by the metadata that Vault has shown last.
    fn hold(&self) -> Option<Hold> {
        self.seen.as_ref().and_then(Metadata::hold)
    }

    /// A test had no answer.
    fn test_soon(&mut self) {
        self.next_test = self.next_test.min(self.now + self.wait());
        self.unanswered += 1;
    }

    /// How long to wait after a test that has no answer.
    fn wait(&self) -> Duration {
        let factor = 2_u32.saturating_pow(self.unanswered);
        TEST_AGAIN.saturating_mul(factor).min(TEST_EVERY)
    }

    /// When to test a key again: with up to a fifth more, so that keys spread out.
    fn after_test(&mut self) -> Duration {
        self.now + TEST_EVERY.mul_f64(1.0 + 0.2 * self.random.f64())
    }
}

fn version_of(of: Option<&Serving>) -> Option<u64> {
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

    /// A rotation, and what it deals with.
    #[derive(Default)]
    struct World {
        rotation: Rotation,
        now: Duration,
        serving: Option<Serving>,
        tested: Option<Serving>,
        /// Versions that Vault does not give, and why.
        faults: BTreeMap<u64, VaultError>,
        /// While this version is read, the key in memory is wiped.
        wiped_by: Option<u64>,
        /// Whether the keys in Vault are others than before.
        is_anew: bool,
    }

    /// Version `1`; `-1` is deleted, `~1` deletes itself some day, and `1'` is another one of the same number.
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

    fn version(version: u64, is_anew: bool) -> Serving {
        let text = |text: &str| Zeroizing::new(text.to_owned());
        let secret = ApiSecret::new(text("fake-secret"));
        let passphrase = Passphrase::new(text("fake-pass"));
        let id = text(&format!("fake-{version}-{is_anew}"));
        Serving {
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
        /// Lets something happen, and returns what is done about it.
        fn run(&mut self, happens: &str) -> String {
            let (what, rest) = happens.split_once(' ').unwrap_or((happens, ""));
            let mut done = Vec::new();
            match what {
                "vault" => {
                    self.is_anew |= rest.contains('\'');
                    self.handle(Event::Metadata(Ok(metadata(rest)), false), &mut done);
                }
                "asked" => self.handle(Event::Metadata(Ok(metadata(rest)), true), &mut done),
                "silent" => {
                    let error = VaultError::Outage("silent".into());
                    self.handle(Event::Metadata(Err(error), false), &mut done);
                }
                "denied" => {
                    self.handle(Event::Metadata(Err(VaultError::Denied), false), &mut done);
                }
                "good" | "refused" | "unclear" => {
                    let mut report = report(match what {
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
                // Bots use the key in memory.
                "accepted" => self.serving.as_ref().unwrap().usage.accepted(1),
                "rejected" => {
                    self.serving.as_ref().unwrap().usage.refused(Refusal {
                        code: rest.to_owned(),
                        advice: "advice".to_owned(),
                        at_ms: 2,
                    });
                }
                "wait" => self.now += Duration::from_secs(rest.parse().unwrap()),
                // The keyring wipes the key for its age; an admin kills it.
                "wiped" => {
                    self.serving = None;
                    self.rotation.forget();
                    assert!(self.rotation.candidate.is_none(), "as old as the key");
                }
                "killed" => self.serving = None,
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
            assert_eq!(
                self.rotation.is_testing(),
                self.tested.is_some(),
                "{happens}"
            );
            assert!(self.rotation.serving.is_none(), "key is kept: {happens}");
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
                    assert!(event.is_none(), "something follows a read");
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
                        Action::LookFor(number) | Action::Read(number) => {
                            if self.wiped_by == Some(number) {
                                self.serving = None;
                            }
                            let found = self.faults.get(&number).cloned();
                            let found =
                                found.map_or_else(|| Ok(version(number, self.is_anew)), Err);
                            event = Some(Event::Version(found));
                            if matches!(action, Action::Read(_)) {
                                format!("read {number}")
                            } else {
                                format!("look for {number}")
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
                        Action::Refuse(next, reason) => {
                            format!("refuse {}: {reason}", next.version)
                        }
                        Action::RefuseLater(version, _) => format!("refuse later {version}"),
                        Action::Reject(serving, _) => format!("keep {serving}"),
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

    /// What happens, and what is done about it; what shows as the problem stands in brackets.
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
            for (happens, done) in start.iter().chain(*story) {
                assert_eq!(
                    world.run(happens),
                    *done,
                    "after: {happens}, in: {story:#?}"
                );
            }
        }
    }

    #[test]
    fn newest_version_serves_at_once_after_a_start_and_the_one_before_it_if_it_is_refused() {
        let second = ("vault 1 2", "read 2, use 2 untested, test serving 2");
        let refused = ("refused", "record 2, read 1, test 1");
        let back = ("good", "use 1, record 1, [version 2 is refused: bad]");
        let stories: &[Story] = &[
            &[("silent", "outage: silent"), second],
            &[("vault", "evict: Vault has no version of it yet"), second],
            &[("vault 1 ~2", "read 2, use 2 untested, test serving 2")],
            &[
                second,
                refused,
                back,
                ("vault 1 2", "confirm, [version 2 is refused: bad]"),
                ("wait 599", "[version 2 is refused: bad]"),
                ("vault 1 2", "confirm, [version 2 is refused: bad]"),
                ("wait 122", "test serving 1, [version 2 is refused: bad]"),
                (
                    "vault 1 2",
                    "read 2, confirm, test 2, [version 2 is refused: bad]",
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
            // Another key has its number now: the one before it has no part in that.
            &[
                second,
                refused,
                ("killed", ""),
                ("vault 1' 2'", "read 2, use 2 untested"),
                ("good", "test serving 2"),
            ],
            // It has signed for a bot: the refusal may be over soon.
            &[second, ("accepted", ""), ("refused", "record 2")],
            &[
                ("vault -1 2", "read 2, use 2 untested, test serving 2"),
                ("refused", "record 2"),
            ],
            // An admin has named it.
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
    fn new_version_serves_once_the_exchange_takes_it() {
        let second = ("vault 1 2", "read 2, confirm, test 2");
        let waits = "await 2, [version 2 is waiting for its test: hm]";
        let again = "confirm, test 2, [version 2 is waiting for its test: hm]";
        let refused = "refuse 2: bad, [version 2 is refused: bad]";
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
                ("vault 1 2", "confirm, [version 2 is refused: bad]"),
                (
                    "asked 1 2",
                    "read 2, confirm, test 2, [version 2 is refused: bad]",
                ),
                ("refused", refused),
                (
                    "vault 1 2 3",
                    "read 3, confirm, test 3, [version 2 is refused: bad]",
                ),
                ("good", "use 3, record 3"),
            ],
            &[
                second,
                ("refused", refused),
                ("wait 721", "test serving 1, [version 2 is refused: bad]"),
                (
                    "vault 1 2",
                    "read 2, confirm, test 2, [version 2 is refused: bad]",
                ),
            ],
            &[
                second,
                ("unclear", waits),
                ("vault 1 2", again),
                ("good", "use 2, record 2"),
            ],
            // What the exchange has told of it is enough where the one in memory is dead.
            &[
                second,
                (
                    "unclear known",
                    "await 2, [version 2 is waiting for its test: hm]",
                ),
                ("rejected 400006", "[version 2 is waiting for its test: hm]"),
                ("vault 1 2", again),
                (
                    "unclear known",
                    "await 2, [version 2 is waiting for its test: hm]",
                ),
                ("rejected 400003", "[version 2 is waiting for its test: hm]"),
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
            // A newer one is tested in place of one whose test hangs, and the one in memory in place of none.
            &[second, ("vault 1 2 3", "read 3, confirm, test 3")],
            &[second, ("vault 1 -2 3", "read 3, confirm, test 3")],
            &[second, ("vault 1 2 use_version=1", "held 1, confirm")],
        ];
        check(START, stories);
    }

    #[test]
    fn unusable_version_takes_no_working_key_away_and_is_read_once() {
        check(
            START,
            &[&[
                ("unusable 2", ""),
                ("vault 1 2", "read 2, keep 1, confirm, [unusable]"),
                ("vault 1 2", "confirm, [unusable]"),
                ("asked 1 2", "read 2, keep 1, confirm, [unusable]"),
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
                ("asked 1", "read 1, evict: unusable"),
                ("vault 1 2", "read 2, use 2 untested, test serving 2"),
            ]],
        );
        let strange = "its custom metadata says use_version=7, and Vault has no such version; see `credbroker keys rollback`";
        let mut world = World::default();
        for (happens, _) in START {
            world.run(happens);
        }
        let kept = format!("keep 1, confirm, [{strange}]");
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
            // A version before it never comes back by itself.
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
                "evict: Vault refuses it to the broker (403); check the broker's policy",
            )],
            &[
                (
                    "vault 1 state=off",
                    "evict: its metadata in Vault says state=off",
                ),
                (
                    "vault 1 state=off",
                    "evict: its metadata in Vault says state=off",
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
    fn version_that_deletes_itself_is_looked_for_at_each_poll() {
        let start: Story = &[
            ("vault ~1", "read 1, use 1 untested, test serving 1"),
            ("good", "record 1"),
            ("vault ~1", "look for 1, confirm"),
        ];
        let second = ("vault ~1 2", "look for 1, read 2, confirm, test 2");
        let stories: &[Story] = &[
            &[("gone 1", ""), ("vault ~1", "look for 1, evict: gone")],
            &[
                second,
                ("unusable 1", ""),
                ("vault ~1 2", "look for 1, confirm"),
                ("gone 1", ""),
                (
                    "vault ~1 2",
                    "look for 1, evict: version 1 has been deleted in Vault, read 2, use 2 untested, test serving 2",
                ),
            ],
            &[
                second,
                ("outage 1", ""),
                ("vault ~1 2", "look for 1, outage: outage"),
                ("good", "use 2, record 2"),
            ],
            &[("outage 1", ""), ("vault ~1", "look for 1, outage: outage")],
        ];
        check(start, stories);
    }

    #[test]
    fn held_version_gives_way_to_a_later_one_only_when_it_is_dead() {
        // Version 2 was the newest one when version 1 was held.
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
            // The one from before the hold is never tried.
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
                    "use 3, record 3, [version 1, which is held in use, is refused: advice]",
                ),
                (
                    later,
                    "held 1, confirm, [version 1, which is held in use, is refused: advice]",
                ),
                (
                    "wait 721",
                    "test serving 3, [version 1, which is held in use, is refused: advice]",
                ),
                (
                    "good",
                    "record 3, [version 1, which is held in use, is refused: advice]",
                ),
                // The held one is tried again.
                (
                    later,
                    "held 1, read 1, confirm, test 1, [version 1, which is held in use, is refused: advice]",
                ),
                ("good", "use 1, record 1"),
            ],
            &[
                (later, "held 1, confirm"),
                ("wait 721", "test serving 1"),
                ("refused", "record 1, read 3, test 3"),
                (
                    "refused",
                    "refuse later 3, [version 3 was written after the hold began, and is refused: bad]",
                ),
                (
                    later,
                    "held 1, confirm, [version 3 was written after the hold began, and is refused: bad]",
                ),
                (
                    "rejected 400003",
                    "[version 3 was written after the hold began, and is refused: bad]",
                ),
                (
                    later,
                    "held 1, confirm, [version 3 was written after the hold began, and is refused: bad]",
                ),
                (
                    "asked 1 2 3 use_version=1 hold=1@2",
                    "held 1, confirm, read 3, test 3",
                ),
                ("good revoked", "test serving 1"),
            ],
            &[
                ("unusable 3", ""),
                ("rejected 400003", ""),
                (later, "held 1, confirm, read 3, [unusable]"),
                (later, "held 1, confirm, [unusable]"),
                // One that is newer still has not been tried.
                (
                    "vault 1 2 3 4 use_version=1 hold=1@2",
                    "held 1, confirm, read 4, test 4",
                ),
            ],
            // An outage of Vault, or a test without an answer: soon again.
            &[
                ("outage 3", ""),
                ("rejected 400003", ""),
                (later, "held 1, confirm, read 3"),
                (later, "held 1, confirm"),
                ("wait 5", ""),
                (later, "held 1, confirm, read 3"),
            ],
            // Without a note of when it began (`use_version` set by hand) nothing is later.
            &[
                ("rejected 400003", ""),
                ("vault 1 2 3 use_version=1", "held 1, confirm"),
            ],
        ];
        check(hold, stories);
    }

    #[test]
    fn admin_goes_back_to_an_older_version_and_on_again() {
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
    fn key_that_is_wiped_or_revoked_takes_its_candidate_along() {
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
                ("killed", ""),
                ("unusable 1", ""),
                ("vault 1", "read 1, evict: unusable"),
                ("vault 1", ""),
            ]],
        );
        // The test of a candidate ends while nothing serves.
        check(
            START,
            &[&[second, ("killed", ""), ("good", "use 2, record 2")]],
        );
        check(
            START,
            &[&[second, ("killed", ""), ("good revoked", "evict: revoked")]],
        );
    }

    #[test]
    fn wait_after_a_test_without_an_answer_doubles_until_one_has_an_answer() {
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
