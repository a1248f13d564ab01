//! What admins have forbidden: accounts that are halted, bots that are blocked, keys that are revoked.
//!
//! In force at once, and on disk before anybody is told so: a restart brings nothing back. It holds names and digests of
//! key ids, no secret.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::base::ids::{AccountId, AdminId, BotId, KeyName, Principal, hex};
use crate::base::lock::{Mutex, RwLock};

/// SHA-256 of the id of a KuCoin API key.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct KeyDigest(pub(crate) [u8; 32]);

/// Name of the file in the state folder.
const FILE: &str = "restrictions.json";

/// Version of the file's form. A file without a number is of the form before, which also had frozen accounts.
const VERSION: u64 = 1;

/// All restrictions.
#[derive(Debug)]
pub(crate) struct Restrictions {
    folder: PathBuf,
    /// Whether the file was there.
    was_found: bool,
    state: RwLock<RestrictionState>,
    /// Held while the file is written, so that it never holds an older state than memory.
    writing: Mutex<()>,
}

/// As it stands in the file.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct RestrictionState {
    #[serde(default)]
    version: u64,
    blocked_bots: BTreeMap<BotId, Mark>,
    /// Of the form before; read as halts.
    #[serde(default, skip_serializing)]
    frozen_accounts: BTreeMap<AccountId, Mark>,
    halted_accounts: BTreeMap<AccountId, Mark>,
    #[serde(skip_serializing_if = "Option::is_none")]
    halted_all: Option<Mark>,
    /// Keys that are dead, whatever Vault says.
    revoked_keys: BTreeMap<KeyDigest, Revoked>,
    /// Keys that were revoked while nobody knew their ids: the first one that Vault shows in this place is dead.
    revoked_unseen: BTreeMap<AccountId, BTreeMap<KeyName, Mark>>,
}

/// What a file of any version has.
#[derive(Deserialize)]
struct Header {
    #[serde(default)]
    version: u64,
}

/// Who forbade it, and when.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Mark {
    /// The admin.
    pub(crate) by: AdminId,
    /// Unix time in milliseconds.
    pub(crate) at_ms: i64,
}

/// A key that is dead.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Revoked {
    /// The account that it served.
    pub(crate) account: AccountId,
    /// Its name there.
    pub(crate) key: KeyName,
    /// The admin who killed it.
    pub(crate) by: AdminId,
    /// Unix time in milliseconds.
    pub(crate) at_ms: i64,
}

/// How much is forbidden.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct Counts {
    /// Bots that are blocked.
    pub(crate) blocked_bots: usize,
    /// Accounts that are halted by name.
    pub(crate) halted_accounts: usize,
    /// Whether all accounts are halted.
    pub(crate) is_all_halted: bool,
    /// Keys that are dead.
    pub(crate) revoked_keys: usize,
}

/// An admin has forbidden it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum Restricted {
    /// The bot.
    #[error("an admin has blocked this bot; nothing was sent")]
    Blocked,
    /// The account, for risk-increasing requests.
    #[error(
        "an admin has halted account {0}: risk-increasing requests are rejected, cancels and reads still work; nothing was sent"
    )]
    Halted(AccountId),
}

/// The file cannot be used or written.
#[derive(Debug, thiserror::Error)]
pub enum RestrictionsError {
    /// It is there and cannot be read: whoever was blocked or revoked must not come back by that.
    #[error(
        "{file} cannot be read, and what it forbids must not be lost; restore it, or remove it if nothing is forbidden: {problem}"
    )]
    Unreadable {
        /// The file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A restriction is in force, but a restart would lift it.
    #[error(
        "it is in force, but not on disk, and a restart would lift it: {0} cannot be written; fix that and re-run the command"
    )]
    Unwritten(String, #[source] io::Error),
    /// A restriction is not lifted.
    #[error("it is still in force: {0} cannot be written; fix that and re-run the command")]
    StillInForce(String, #[source] io::Error),
}

impl Restrictions {
    /// Reads what is forbidden from the state folder; nothing is where there is no such file.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
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

    /// Whether the file was there when it was read.
    pub(crate) fn was_found(&self) -> bool {
        self.was_found
    }

    /// Writes the file where none was found: from then on a start without one means that it was lost.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn create(&self) -> io::Result<()> {
        let _writing = self.writing.lock();
        let state = self.state.read().clone();
        self.write(&state)
    }

    /// Whether whoever it is may go on; `increases_risk` is what the request does to `account`.
    ///
    /// # Errors
    /// When an admin has forbidden it.
    pub(crate) fn check(
        &self,
        who: &Principal,
        account: &AccountId,
        increases_risk: bool,
    ) -> Result<(), Restricted> {
        let state = self.state.read();
        if who
            .bot()
            .is_some_and(|bot| state.blocked_bots.contains_key(bot))
        {
            return Err(Restricted::Blocked);
        }
        if increases_risk && state.is_halted(account) {
            return Err(Restricted::Halted(account.clone()));
        }
        Ok(())
    }

    /// How much is forbidden.
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

    /// Whether risk-increasing requests on an account are rejected.
    pub(crate) fn is_halted(&self, account: &AccountId) -> bool {
        self.state.read().is_halted(account)
    }

    /// Whether all accounts are halted, also those that the rules name later.
    pub(crate) fn is_all_halted(&self) -> bool {
        self.state.read().halted_all.is_some()
    }

    /// The accounts that are halted by name.
    pub(crate) fn halted_accounts(&self) -> Vec<AccountId> {
        self.state.read().halted_accounts.keys().cloned().collect()
    }

    /// The bots that are blocked.
    pub(crate) fn blocked_bots(&self) -> Vec<(BotId, Mark)> {
        self.state.read().blocked_bots.clone().into_iter().collect()
    }

    /// Why a key must not be used, if it is dead.
    pub(crate) fn revoked(&self, key: KeyDigest) -> Option<Revoked> {
        self.state.read().revoked_keys.get(&key).cloned()
    }

    /// Why a key must not be used in this place, if it or whatever is there is dead.
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

    /// Whether a key must not be used: it is dead, or whatever is in its place (where it has one) is.
    pub(crate) fn is_revoked(&self, key: KeyDigest, place: Option<(&AccountId, &KeyName)>) -> bool {
        let state = self.state.read();
        let is_unseen = |(account, name)| state.unseen(account, name).is_some();
        state.revoked_keys.contains_key(&key) || place.is_some_and(is_unseen)
    }

    /// Whether the next key that Vault shows in this place is dead.
    pub(crate) fn has_revoked_unseen(&self, account: &AccountId, name: &KeyName) -> bool {
        self.state.read().unseen(account, name).is_some()
    }

    /// Whether `last`, the last key known in this place, is dead, or the first one that Vault shows there will be.
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

    /// Whether the first key that Vault shows in this place is dead; it is `key`, and is known to be from now on.
    ///
    /// # Errors
    /// When that cannot be written; it is dead all the same.
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

    /// Kills a key, or, where its id is not known, the first one that Vault will show in its place.
    ///
    /// # Errors
    /// When it is in force, but cannot be written.
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

    /// Rejects risk-increasing requests on an account; without one on all accounts, also those that the rules name later.
    ///
    /// # Errors
    /// When it is in force, but cannot be written.
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

    /// Lifts the halt of an account by its name; without one the halt of all accounts, and none by name. Returns whether
    /// there was one.
    ///
    /// # Errors
    /// When that cannot be written; it is halted still.
    pub(crate) fn resume(&self, account: Option<&AccountId>) -> Result<bool, RestrictionsError> {
        self.loosen(|state| match account {
            Some(account) => state.halted_accounts.remove(account).is_some(),
            None => state.halted_all.take().is_some(),
        })
    }

    /// Refuses every call of a bot. Returns whether it was blocked already.
    ///
    /// # Errors
    /// When it is in force, but cannot be written.
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

    /// Undoes [`Restrictions::block`]. Returns whether it was blocked.
    ///
    /// # Errors
    /// When that cannot be written; it is blocked still.
    pub(crate) fn unblock(&self, bot: &BotId) -> Result<bool, RestrictionsError> {
        self.loosen(|state| state.blocked_bots.remove(bot).is_some())
    }

    /// Forbids something: in force first, then on disk, since a full disk must not keep an admin from stopping a bot, nor
    /// a disk that hangs in somebody else's write.
    fn tighten<T>(
        &self,
        change: impl Fn(&mut RestrictionState) -> T,
    ) -> Result<T, RestrictionsError> {
        let result = self.change(&change);
        let _writing = self.writing.lock();
        // Once more: who lifted it meanwhile did not know of this.
        self.change(change);
        let state = self.state.read().clone();
        self.write(&state)
            .map_err(|error| RestrictionsError::Unwritten(self.file(), error))?;
        Ok(result)
    }

    /// Allows something again: on disk first.
    fn loosen<T>(
        &self,
        change: impl Fn(&mut RestrictionState) -> T,
    ) -> Result<T, RestrictionsError> {
        let _writing = self.writing.lock();
        let mut state = self.state.read().clone();
        change(&mut state);
        self.write(&state)
            .map_err(|error| RestrictionsError::StillInForce(self.file(), error))?;
        // What was forbidden meanwhile stays so.
        Ok(self.change(change))
    }

    fn change<T>(&self, change: impl FnOnce(&mut RestrictionState) -> T) -> T {
        change(&mut self.state.write())
    }

    /// A whole new file takes the place of the old one, and both it and the folder are flushed.
    fn write(&self, state: &RestrictionState) -> io::Result<()> {
        let new = self.folder.join(format!("{FILE}.new"));
        let mut text = serde_json::to_vec_pretty(state)?;
        text.push(b'\n');
        // What is left of an interrupted write, or put there by somebody else: a link would lead elsewhere, and a file
        // would keep its owner and mode.
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = File::options();
        options.create_new(true).write(true).mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let mut file = options.open(&new)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&new, self.folder.join(FILE))?;
        File::open(&self.folder)?.sync_all()
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
    /// Reads the file, also in the form before. What a newer broker has forbidden may be unknown here, and is refused.
    fn read(text: &[u8]) -> Result<Self, String> {
        let Header { version } = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if version > VERSION {
            return Err(format!(
                "it has version {version}, and this broker reads up to version {VERSION}; start the newer broker that wrote it"
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

    /// Reads 64 hex digits.
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
    fn what_is_forbidden_stays_so_when_the_file_is_read_again() {
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
        let who = Principal::Bot(bot.clone());
        assert_eq!(
            again.check(&who, &account("c"), false),
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
        // Only the first one that is seen.
        again
            .seen(&account("b"), &name, KeyDigest([2; 32]))
            .unwrap();
        assert!(again.revoked(KeyDigest([2; 32])).is_none());
        assert!(again.unblock(&bot).unwrap());
        assert!(again.resume(Some(&account("a"))).unwrap());
        let last = Restrictions::open(folder.path()).unwrap();
        assert_eq!(last.check(&who, &account("a"), true), Ok(()));
        assert!(last.is_halted(&account("b")));
        assert!(last.revoked(unseen).is_some());
    }

    #[test]
    fn halt_of_all_covers_later_accounts_and_a_halt_by_name_outlasts_it() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        restrictions.halt(Some(&account("a")), &mark()).unwrap();
        restrictions.halt(None, &mark()).unwrap();
        assert!(restrictions.is_halted(&account("not-yet-there")));
        assert!(!restrictions.resume(Some(&account("b"))).unwrap());
        assert!(restrictions.is_halted(&account("b")), "halted with all");
        assert!(restrictions.resume(None).unwrap());
        assert!(!restrictions.resume(None).unwrap());
        assert!(!restrictions.is_halted(&account("b")));
        assert!(restrictions.is_halted(&account("a")));
        assert_eq!(restrictions.halted_accounts(), [account("a")]);
    }

    /// As the version before wrote it.
    const FORM_BEFORE: &str = r#"{
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

    /// The same once it was written again.
    const FORM_NOW: &str = r#"{
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
    fn frozen_accounts_of_the_form_before_are_halts_and_written_as_such() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(FILE);
        fs::write(&file, FORM_BEFORE).unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        let (both, main) = (account("both"), account("main"));
        assert_eq!(restrictions.halted_accounts(), [both.clone(), main.clone()]);
        assert!(restrictions.is_all_halted());
        assert_eq!(
            fs::read_to_string(&file).unwrap(),
            FORM_BEFORE,
            "reading writes nothing"
        );
        assert!(restrictions.resume(None).unwrap());
        assert!(restrictions.is_halted(&main));
        assert_eq!(fs::read_to_string(&file).unwrap(), FORM_NOW);
        let again = Restrictions::open(folder.path()).unwrap();
        assert_eq!(again.counts(), restrictions.counts());
        assert!(again.resume(Some(&both)).unwrap() && again.resume(Some(&main)).unwrap());
        assert_eq!(again.halted_accounts(), []);
    }

    #[test]
    fn file_of_a_newer_version_is_refused_whatever_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        let newer = r#"{ "version": 2, "blocked_bots": [], "other": 1 }"#;
        fs::write(folder.path().join(FILE), newer).unwrap();
        let error = Restrictions::open(folder.path()).unwrap_err().to_string();
        let expected = "it has version 2, and this broker reads up to version 1; start the newer broker that wrote it";
        assert!(error.ends_with(expected), "{error}");
    }

    #[test]
    fn a_file_that_cannot_be_read_forbids_the_start() {
        let folder = tempfile::tempdir().unwrap();
        for broken in ["", "{", "{\"blocked_bots\":{},\"typo\":1}"] {
            fs::write(folder.path().join(FILE), broken).unwrap();
            let error = Restrictions::open(folder.path()).unwrap_err().to_string();
            assert!(error.contains("must not be lost"), "{error}");
        }
    }

    #[test]
    fn a_disk_that_hangs_keeps_no_admin_from_forbidding_more_and_lifts_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        restrictions.halt(Some(&account("a")), &mark()).unwrap();
        // Held by whoever writes, for as long as the disk takes.
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
            assert!(is_halted, "it waits for somebody else's write");
            assert!(!is_lifted, "it is not on disk");
        });
        assert!(restrictions.is_halted(&account("b")));
    }

    #[test]
    fn the_new_file_replaces_whatever_stands_in_its_place_and_follows_no_link() {
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
            assert!(file.is_file(), "a link has taken the place of the file");
            assert_eq!(file.mode() & 0o7777, 0o600);
            assert_eq!(fs::read_to_string(&victim).unwrap(), "not ours");
            assert!(!new.exists());
            let again = Restrictions::open(folder.path()).unwrap();
            assert!(again.is_halted(&account("a")));
        }
    }

    #[test]
    fn what_is_forbidden_while_something_is_lifted_stays_forbidden() {
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
    fn what_cannot_be_written_is_forbidden_all_the_same_and_never_allowed() {
        let folder = tempfile::tempdir().unwrap();
        let restrictions = Restrictions::open(folder.path()).unwrap();
        restrictions.halt(Some(&account("a")), &mark()).unwrap();
        // A folder where the new file should be written: also root cannot.
        fs::create_dir(folder.path().join(format!("{FILE}.new"))).unwrap();
        let error = restrictions.halt(Some(&account("b")), &mark()).unwrap_err();
        assert!(matches!(error, RestrictionsError::Unwritten(..)));
        assert!(restrictions.is_halted(&account("b")));
        let error = restrictions.resume(Some(&account("a"))).unwrap_err();
        assert!(matches!(error, RestrictionsError::StillInForce(..)));
        assert!(restrictions.is_halted(&account("a")));
    }
}
