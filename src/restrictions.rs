//! Restrictions that admins set: halted accounts, blocked bots, revoked keys.
//!
//! A new restriction takes effect at once. It is on disk before the admin's command succeeds, and so survives a restart.
//! The file has names and digests of key ids, no secrets.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::base::ids::{AccountId, AdminId, BotId, KeyName, Principal, hex};
use crate::base::lock::{Mutex, RwLock};
use crate::base::state_file;

/// SHA-256 of the id of a KuCoin API key.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct KeyDigest(pub(crate) [u8; 32]);

/// The file's name in the state folder.
const FILE: &str = "restrictions.json";

/// Version of the file format. A file without a version has the previous format, which also had frozen accounts.
const VERSION: u64 = 1;

/// All restrictions.
#[derive(Debug)]
pub(crate) struct Restrictions {
    folder: PathBuf,
    /// Whether the file existed at the start.
    was_found: bool,
    state: RwLock<RestrictionState>,
    /// Locked while the file is written, so that an older state never overwrites a newer one.
    writing: Mutex<()>,
}

/// The content of the file.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RestrictionState {
    #[serde(default)]
    version: u64,
    blocked_bots: BTreeMap<BotId, Mark>,
    /// From the previous format; read as halts.
    #[serde(default, skip_serializing)]
    frozen_accounts: BTreeMap<AccountId, Mark>,
    halted_accounts: BTreeMap<AccountId, Mark>,
    #[serde(skip_serializing_if = "Option::is_none")]
    halted_all: Option<Mark>,
    /// Keys that are revoked, whatever their state in Vault.
    revoked_keys: BTreeMap<KeyDigest, Revoked>,
    /// Keys that were revoked before the broker had read them from Vault: the first key that it reads under this name is
    /// revoked.
    revoked_unseen: BTreeMap<AccountId, BTreeMap<KeyName, Mark>>,
}

/// The part that a file of any version has.
#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    version: u64,
}

/// Which admin set a restriction, and when.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mark {
    /// The admin.
    pub(crate) by: AdminId,
    /// Unix time in milliseconds.
    pub(crate) at_ms: i64,
}

/// A revoked key.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Revoked {
    /// Its account.
    pub(crate) account: AccountId,
    /// Its name in that account.
    pub(crate) key: KeyName,
    /// The admin who revoked it.
    pub(crate) by: AdminId,
    /// Unix time in milliseconds.
    pub(crate) at_ms: i64,
}

/// The number of restrictions.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Counts {
    /// Bots that are blocked.
    pub(crate) blocked_bots: usize,
    /// Accounts that are halted individually.
    pub(crate) halted_accounts: usize,
    /// Whether all accounts are halted.
    pub(crate) is_all_halted: bool,
    /// Keys that are revoked.
    pub(crate) revoked_keys: usize,
}

/// A restriction applies to the request.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Restricted {
    /// The bot is blocked.
    #[error("an admin has blocked this bot; nothing was sent")]
    Blocked,
    /// The account is halted, and the request is risk-increasing.
    #[error(
        "an admin has halted account {0}: risk-increasing requests are refused, cancels and reads still work; nothing was sent"
    )]
    Halted(AccountId),
}

/// `restrictions.json` cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RestrictionsError {
    /// The file exists but cannot be read. The broker does not start: that would lift all restrictions.
    #[error(
        "cannot read {file}, which holds all blocks, halts and revocations: {problem}. Restore it from a backup; delete it only if \
         you know that nothing is blocked, halted or revoked: without the file, no block, halt or revocation applies"
    )]
    Unreadable {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A new restriction is in effect, but a restart would lift it.
    #[error(
        "the change is in effect but not saved, and a restart would undo it: {0} cannot be written; fix that and re-run the command"
    )]
    Unwritten(String, #[source] io::Error),
    /// A restriction was not lifted.
    #[error(
        "the halt or block is still in effect: {0} cannot be written; fix that and re-run the command"
    )]
    StillInForce(String, #[source] io::Error),
}

impl Restrictions {
    /// Reads the file in the state folder; without a file there are no restrictions.
    ///
    /// # Errors
    /// When the file exists but cannot be read.
    pub(crate) fn open(folder: &Path) -> Result<Self, RestrictionsError> {
        let file = folder.join(FILE);
        let unreadable = |problem: String| RestrictionsError::Unreadable {
            file: file.display().to_string(),
            problem,
        };
        let found = match fs::read(&file) {
            Ok(text) => Some(RestrictionState::read(&text).map_err(unreadable)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(unreadable(error.to_string())),
        };
        let was_found = found.is_some();
        let mut state = found.unwrap_or_default();
        state.version = VERSION;
        Ok(Self {
            folder: folder.to_owned(),
            was_found,
            state: RwLock::new(state),
            writing: Mutex::default(),
        })
    }

    /// Whether the file existed at the start.
    pub(crate) fn was_found(&self) -> bool {
        self.was_found
    }

    /// Creates the file if none was found: a later start without one means that it was lost.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn create(&self) -> io::Result<()> {
        let _writing = self.writing.lock();
        let state = self.state.read().clone();
        self.write(&state)
    }

    /// Checks a request of `principal` on `account`; `increases_risk`: whether it is risk-increasing.
    ///
    /// # Errors
    /// When the bot is blocked, or the account is halted and the request is risk-increasing.
    pub(crate) fn check(
        &self,
        principal: &Principal,
        account: &AccountId,
        increases_risk: bool,
    ) -> Result<(), Restricted> {
        if let Some(bot) = principal.bot() {
            self.check_bot(bot)?;
        }
        let state = self.state.read();
        if increases_risk && state.is_halted(account) {
            return Err(Restricted::Halted(account.clone()));
        }
        Ok(())
    }

    /// Whether a bot may call at all.
    ///
    /// # Errors
    /// When it is blocked.
    pub(crate) fn check_bot(&self, bot: &BotId) -> Result<(), Restricted> {
        if self.state.read().blocked_bots.contains_key(bot) {
            return Err(Restricted::Blocked);
        }
        Ok(())
    }

    /// The number of restrictions.
    pub(crate) fn counts(&self) -> Counts {
        let state = self.state.read();
        let unseen = state.revoked_unseen.values().map(BTreeMap::len);
        Counts {
            blocked_bots: state.blocked_bots.len(),
            halted_accounts: state.halted_accounts.len(),
            is_all_halted: state.halted_all.is_some(),
            revoked_keys: state.revoked_keys.len() + unseen.sum::<usize>(),
        }
    }

    /// Whether an account is halted, individually or with all accounts.
    pub(crate) fn is_halted(&self, account: &AccountId) -> bool {
        self.state.read().is_halted(account)
    }

    /// Whether all accounts are halted, including those that are added to the rules later.
    pub(crate) fn is_all_halted(&self) -> bool {
        self.state.read().halted_all.is_some()
    }

    /// The accounts that are halted individually.
    pub(crate) fn halted_accounts(&self) -> Vec<AccountId> {
        self.state.read().halted_accounts.keys().cloned().collect()
    }

    /// The bots that are blocked.
    pub(crate) fn blocked_bots(&self) -> Vec<(BotId, Mark)> {
        self.state.read().blocked_bots.clone().into_iter().collect()
    }

    /// The revocation of a key, if it is revoked.
    pub(crate) fn revoked(&self, key: KeyDigest) -> Option<Revoked> {
        self.state.read().revoked_keys.get(&key).cloned()
    }

    /// The revocation of a key, or of the first key to be read under this name, if there is one.
    pub(crate) fn revoked_in(
        &self,
        account: &AccountId,
        name: &KeyName,
        key: KeyDigest,
    ) -> Option<Revoked> {
        let state = self.state.read();
        let unseen = || Some(Revoked::new(account, name, state.unseen(account, name)?));
        state.revoked_keys.get(&key).cloned().or_else(unseen)
    }

    /// Whether a key is revoked, itself or as the first key to be read under its name (if it has one).
    pub(crate) fn is_revoked(&self, key: KeyDigest, named: Option<(&AccountId, &KeyName)>) -> bool {
        let state = self.state.read();
        let is_unseen = |(account, name)| state.unseen(account, name).is_some();
        state.revoked_keys.contains_key(&key) || named.is_some_and(is_unseen)
    }

    /// Whether the first key to be read from Vault under this name is revoked.
    pub(crate) fn has_pending_revocation(&self, account: &AccountId, name: &KeyName) -> bool {
        self.state.read().unseen(account, name).is_some()
    }

    /// Whether `last`, the last key read under this name, is revoked, or the first key to be read under it.
    pub(crate) fn has_revoked(
        &self,
        account: &AccountId,
        name: &KeyName,
        last: Option<KeyDigest>,
    ) -> bool {
        let state = self.state.read();
        let unseen = state.revoked_unseen.get(account);
        last.is_some_and(|key| state.revoked_keys.contains_key(&key))
            || unseen.is_some_and(|keys| keys.contains_key(name))
    }

    /// Revokes `key`, just read from Vault, if the first key to be read under this name was revoked.
    ///
    /// # Errors
    /// When this cannot be written; `key` is revoked nevertheless.
    pub(crate) fn seen(
        &self,
        account: &AccountId,
        name: &KeyName,
        key: KeyDigest,
    ) -> Result<(), RestrictionsError> {
        let Some(mark) = self.state.read().unseen(account, name).cloned() else {
            return Ok(());
        };
        self.tighten(|state| {
            let revoked = Revoked::new(account, name, &mark);
            state.revoked_keys.entry(key).or_insert(revoked);
            if state.unseen(account, name) == Some(&mark)
                && let Some(keys) = state.revoked_unseen.get_mut(account)
            {
                keys.remove(name);
            }
            state.revoked_unseen.retain(|_, keys| !keys.is_empty());
        })
    }

    /// Revokes a key, or, if `key` is `None`, the first key to be read from Vault under this name.
    ///
    /// # Errors
    /// When it is in effect but cannot be written.
    pub(crate) fn revoke(
        &self,
        account: &AccountId,
        name: &KeyName,
        key: Option<KeyDigest>,
        mark: &Mark,
    ) -> Result<(), RestrictionsError> {
        self.tighten(|state| {
            if let Some(key) = key {
                let revoked = Revoked::new(account, name, mark);
                state.revoked_keys.entry(key).or_insert(revoked);
            } else {
                let keys = state.revoked_unseen.entry(account.clone()).or_default();
                keys.entry(name.clone()).or_insert_with(|| mark.clone());
            }
        })
    }

    /// Halts an account (its risk-increasing requests are refused). `None` halts all accounts, including those that are added
    /// to the rules later.
    ///
    /// # Errors
    /// When it is in effect but cannot be written.
    pub(crate) fn halt(
        &self,
        account: Option<&AccountId>,
        mark: &Mark,
    ) -> Result<(), RestrictionsError> {
        self.tighten(|state| match account {
            Some(account) => {
                state
                    .halted_accounts
                    .entry(account.clone())
                    .or_insert_with(|| mark.clone());
            }
            None => {
                state.halted_all.get_or_insert_with(|| mark.clone());
            }
        })
    }

    /// Lifts the halt of one account. `None` lifts the halt of all accounts; accounts that were also halted individually stay
    /// halted. Returns whether there was such a halt.
    ///
    /// # Errors
    /// When this cannot be written; the halt then stays in effect.
    pub(crate) fn resume(&self, account: Option<&AccountId>) -> Result<bool, RestrictionsError> {
        self.loosen(|state| match account {
            Some(account) => state.halted_accounts.remove(account).is_some(),
            None => state.halted_all.take().is_some(),
        })
    }

    /// Blocks a bot: all its calls are refused. Returns whether it was blocked already.
    ///
    /// # Errors
    /// When it is in effect but cannot be written.
    pub(crate) fn block(&self, bot: &BotId, mark: &Mark) -> Result<bool, RestrictionsError> {
        self.tighten(|state| {
            let is_new = !state.blocked_bots.contains_key(bot);
            state
                .blocked_bots
                .entry(bot.clone())
                .or_insert_with(|| mark.clone());
            !is_new
        })
    }

    /// Unblocks a bot. Returns whether it was blocked.
    ///
    /// # Errors
    /// When this cannot be written; the bot then stays blocked.
    pub(crate) fn unblock(&self, bot: &BotId) -> Result<bool, RestrictionsError> {
        self.loosen(|state| state.blocked_bots.remove(bot).is_some())
    }

    /// Adds a restriction: first in memory, then on disk. A full disk, or one that hangs in another write, must not prevent an
    /// admin from stopping a bot.
    fn tighten<T>(
        &self,
        change: impl Fn(&mut RestrictionState) -> T,
    ) -> Result<T, RestrictionsError> {
        let result = self.change(&change);
        let _writing = self.writing.lock();
        // Again, because another admin may have lifted it while this one waited for the lock.
        self.change(change);
        let state = self.state.read().clone();
        self.write(&state)
            .map_err(|error| RestrictionsError::Unwritten(self.file(), error))?;
        Ok(result)
    }

    /// Lifts a restriction: first on disk, then in memory.
    fn loosen<T>(
        &self,
        change: impl Fn(&mut RestrictionState) -> T,
    ) -> Result<T, RestrictionsError> {
        let _writing = self.writing.lock();
        let mut state = self.state.read().clone();
        change(&mut state);
        self.write(&state)
            .map_err(|error| RestrictionsError::StillInForce(self.file(), error))?;
        // Applied to the current state, which keeps restrictions that were added during the write.
        Ok(self.change(change))
    }

    fn change<T>(&self, change: impl FnOnce(&mut RestrictionState) -> T) -> T {
        change(&mut self.state.write())
    }

    fn write(&self, state: &RestrictionState) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(state)?;
        text.push(b'\n');
        state_file::replace(&self.folder, FILE, &text)
    }

    fn file(&self) -> String {
        self.folder.join(FILE).display().to_string()
    }
}

impl Revoked {
    fn new(account: &AccountId, key: &KeyName, mark: &Mark) -> Self {
        Self {
            account: account.clone(),
            key: key.clone(),
            by: mark.by.clone(),
            at_ms: mark.at_ms,
        }
    }
}

impl RestrictionState {
    /// Parses the file, also in the previous format. A newer format is an error: it can hold restrictions unknown here.
    fn read(text: &[u8]) -> Result<Self, String> {
        let Header { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if version > VERSION {
            return Err(format!(
                "its format version is {version}, but this release of credbroker reads versions up to {VERSION}; run the newer release \
                 that wrote it"
            ));
        }
        let mut state: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        for (account, mark) in std::mem::take(&mut state.frozen_accounts) {
            state.halted_accounts.entry(account).or_insert(mark);
        }
        Ok(state)
    }

    fn unseen(&self, account: &AccountId, name: &KeyName) -> Option<&Mark> {
        self.revoked_unseen.get(account)?.get(name)
    }

    fn is_halted(&self, account: &AccountId) -> bool {
        self.halted_all.is_some() || self.halted_accounts.contains_key(account)
    }
}

impl KeyDigest {
    /// 64 hex digits.
    pub(crate) fn hex(self) -> String {
        hex(&self.0)
    }

    /// Parses 64 hex digits.
    fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 64 {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl Serialize for KeyDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.hex())
    }
}

impl<'de> Deserialize<'de> for KeyDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text)
            .ok_or_else(|| serde::de::Error::custom("expected the SHA-256 of a key id in hex"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark() -> Mark {
        Mark {
            by: "spiffe://demo.test/admin/anna".parse().unwrap(),
            at_ms: 1,
        }
    }

    fn account(name: &str) -> AccountId {
        name.parse().unwrap()
    }

    #[test]
    fn restrictions_are_the_same_after_the_file_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        let (bot, key) = ("maker".parse::<BotId>().unwrap(), KeyDigest([0xab; 32]));
        let name = "main".parse::<KeyName>().unwrap();
        assert!(!restrictions.block(&bot, &mark()).unwrap());
        assert!(restrictions.block(&bot, &mark()).unwrap());
        for name in ["a", "b"] {
            restrictions.halt(Some(&account(name)), &mark()).unwrap();
        }
        restrictions
            .revoke(&account("a"), &name, Some(key), &mark())
            .unwrap();
        restrictions
            .revoke(&account("b"), &name, None, &mark())
            .unwrap();
        let again = Restrictions::open(folder.path()).unwrap();
        let principal = Principal::Bot(bot.clone());
        assert_eq!(
            again.check(&principal, &account("c"), false),
            Err(Restricted::Blocked)
        );
        let other = Principal::Bot("other".parse().unwrap());
        for halted in ["a", "b"] {
            let refused = Err(Restricted::Halted(account(halted)));
            assert_eq!(again.check(&other, &account(halted), true), refused);
            assert_eq!(again.check(&other, &account(halted), false), Ok(()));
        }
        assert_eq!(again.check(&other, &account("c"), true), Ok(()));
        assert!(again.revoked(key).is_some());
        let unseen = KeyDigest([1; 32]);
        assert!(again.revoked(unseen).is_none());
        again.seen(&account("b"), &name, unseen).unwrap();
        assert!(again.revoked(unseen).is_some());
        // Only the first key read under the name is revoked.
        again
            .seen(&account("b"), &name, KeyDigest([2; 32]))
            .unwrap();
        assert!(again.revoked(KeyDigest([2; 32])).is_none());
        assert!(again.unblock(&bot).unwrap());
        assert!(again.resume(Some(&account("a"))).unwrap());
        let last = Restrictions::open(folder.path()).unwrap();
        assert_eq!(last.check(&principal, &account("a"), true), Ok(()));
        assert!(last.is_halted(&account("b")));
        assert!(last.revoked(unseen).is_some());
    }

    #[test]
    fn halt_of_all_covers_later_accounts_and_lifting_it_keeps_individual_halts() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        restrictions.halt(Some(&account("a")), &mark()).unwrap();
        restrictions.halt(None, &mark()).unwrap();
        assert!(restrictions.is_halted(&account("not-yet-there")));
        assert!(!restrictions.resume(Some(&account("b"))).unwrap());
        assert!(
            restrictions.is_halted(&account("b")),
            "all accounts are halted"
        );
        assert!(restrictions.resume(None).unwrap());
        assert!(!restrictions.resume(None).unwrap());
        assert!(!restrictions.is_halted(&account("b")));
        assert!(restrictions.is_halted(&account("a")));
        assert_eq!(restrictions.halted_accounts(), [account("a")]);
    }

    /// A file in the previous format.
    const PREVIOUS_FORMAT: &str = r#"{
  "blocked_bots": {
    "spiffe://example.org/bot/maker": {
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822040
    }
  },
  "frozen_accounts": {
    "both": {
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822042
    },
    "main": {
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822041
    }
  },
  "halted_accounts": {
    "both": {
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822043
    }
  },
  "halted_all": {
    "by": "spiffe://example.org/admin/anna",
    "at_ms": 1792751822044
  },
  "revoked_keys": {
    "abababababababababababababababababababababababababababababababab": {
      "account": "main",
      "key": "main",
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822045
    }
  },
  "revoked_unseen": {
    "other": {
      "main": {
        "by": "spiffe://example.org/admin/anna",
        "at_ms": 1792751822046
      }
    }
  }
}
"#;

    /// The same file after it was written again, without `halted_all`.
    const CURRENT_FORMAT: &str = r#"{
  "version": 1,
  "blocked_bots": {
    "spiffe://example.org/bot/maker": {
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822040
    }
  },
  "halted_accounts": {
    "both": {
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822043
    },
    "main": {
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822041
    }
  },
  "revoked_keys": {
    "abababababababababababababababababababababababababababababababab": {
      "account": "main",
      "key": "main",
      "by": "spiffe://example.org/admin/anna",
      "at_ms": 1792751822045
    }
  },
  "revoked_unseen": {
    "other": {
      "main": {
        "by": "spiffe://example.org/admin/anna",
        "at_ms": 1792751822046
      }
    }
  }
}
"#;

    #[test]
    fn frozen_accounts_of_the_previous_format_become_halts() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        fs::write(&file, PREVIOUS_FORMAT).unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        let (both, main) = (account("both"), account("main"));
        assert_eq!(restrictions.halted_accounts(), [both.clone(), main.clone()]);
        assert!(restrictions.is_all_halted());
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            PREVIOUS_FORMAT,
            "reading writes nothing"
        );
        assert!(restrictions.resume(None).unwrap());
        assert!(restrictions.is_halted(&main));
        assert_eq!(fs::read_to_string(&file).unwrap(), CURRENT_FORMAT);
        let again = Restrictions::open(folder.path()).unwrap();
        assert_eq!(again.counts(), restrictions.counts());
        assert!(again.resume(Some(&both)).unwrap() && again.resume(Some(&main)).unwrap());
        assert_eq!(again.halted_accounts(), []);
    }

    #[test]
    fn file_of_a_newer_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let newer = r#"{ "version": 2, "blocked_bots": [], "other": 1 }"#;
        fs::write(folder.path().join(FILE), newer).unwrap();
        let error = Restrictions::open(folder.path()).unwrap_err().to_string();
        let expected = "its format version is 2, but this release of credbroker reads versions up to 1; run the newer release that wrote it. ";
        assert!(error.contains(expected), "{error}");
    }

    #[test]
    fn file_that_cannot_be_parsed_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        for broken in ["", "{", "{\"blocked_bots\":{},\"typo\":1}"] {
            fs::write(folder.path().join(FILE), broken).unwrap();
            let error = Restrictions::open(folder.path()).unwrap_err().to_string();
            assert!(
                error.contains("holds all blocks, halts and revocations"),
                "{error}"
            );
        }
    }

    #[test]
    fn hanging_disk_delays_no_new_restriction_and_lifts_none() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        restrictions.halt(Some(&account("a")), &mark()).unwrap();
        // As while another thread writes to a disk that hangs.
        let writing = restrictions.writing.lock();
        std::thread::scope(|scope| {
            let resume = scope.spawn(|| restrictions.resume(Some(&account("a"))));
            let halt = scope.spawn(|| restrictions.halt(Some(&account("b")), &mark()));
            let began = std::time::Instant::now();
            while !restrictions.is_halted(&account("b")) && began.elapsed().as_secs() < 5 {
                std::thread::yield_now();
            }
            let is_halted = restrictions.is_halted(&account("b"));
            let is_lifted = !restrictions.is_halted(&account("a"));
            drop(writing);
            let _ = (resume.join(), halt.join());
            assert!(is_halted, "the halt waited for another write");
            assert!(!is_lifted, "the halt was lifted before it was on disk");
        });
        assert!(restrictions.is_halted(&account("b")));
    }

    #[test]
    fn new_file_replaces_a_planted_file_and_follows_no_planted_link() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        let new = folder.path().join(format!("{FILE}.new"));
        let victim = folder.path().join("victim");
        fs::write(&victim, "not ours").unwrap();
        let plant_link = || symlink(&victim, &new).unwrap();
        let plant_open_file = || {
            fs::write(&new, "left by an interrupted write").unwrap();
            fs::set_permissions(&new, fs::Permissions::from_mode(0o666)).unwrap();
        };
        let plants: [&dyn Fn(); 2] = [&plant_link, &plant_open_file];
        for plant in plants {
            plant();
            restrictions.halt(Some(&account("a")), &mark()).unwrap();
            let file = fs::symlink_metadata(folder.path().join(FILE)).unwrap();
            assert!(file.is_file(), "the file was replaced by a link");
            assert_eq!(file.mode() & 0o7777, 0o600);
            assert_eq!(fs::read_to_string(&victim).unwrap(), "not ours");
            assert!(!new.exists());
            let again = Restrictions::open(folder.path()).unwrap();
            assert!(again.is_halted(&account("a")));
        }
    }

    #[test]
    fn restrictions_added_while_another_is_lifted_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        let bot = |n: u32| format!("bot-{n}").parse::<BotId>().unwrap();
        restrictions.halt(Some(&account("a")), &mark()).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0..50 {
                    restrictions.block(&bot(n), &mark()).unwrap();
                }
            });
            scope.spawn(|| {
                for _ in 0..50 {
                    restrictions.resume(Some(&account("a"))).unwrap();
                }
            });
        });
        let again = Restrictions::open(folder.path()).unwrap();
        assert_eq!(restrictions.blocked_bots().len(), 50);
        assert_eq!(again.blocked_bots(), restrictions.blocked_bots());
    }

    #[test]
    fn failed_write_keeps_new_restrictions_and_lifts_none() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        restrictions.halt(Some(&account("a")), &mark()).unwrap();
        // A folder with the name of the new file: not even root can write the file.
        fs::create_dir(folder.path().join(format!("{FILE}.new"))).unwrap();
        let error = restrictions.halt(Some(&account("b")), &mark()).unwrap_err();
        assert!(matches!(error, RestrictionsError::Unwritten(..)));
        assert!(restrictions.is_halted(&account("b")));
        let error = restrictions.resume(Some(&account("a"))).unwrap_err();
        assert!(matches!(error, RestrictionsError::StillInForce(..)));
        assert!(restrictions.is_halted(&account("a")));
    }
}
