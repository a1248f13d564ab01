//! What Vault says about a key beside its values: its versions, and what admins have noted in custom metadata.
//!
//! Of the notes, `state` and `use_version` are authority, and `hold` says when `use_version` began. The others are hints: what
//! was found out when a version was registered (`for_version` says which).

use std::collections::{BTreeMap, HashMap};

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use serde::Deserialize;

/// How many notes Vault keeps for a key.
pub(super) const MAX_NOTES: usize = 64;

/// How long a note may be, in bytes.
const MAX_NOTE_BYTES: usize = 512;

/// Words of the note `state` that switch a key off, in any case.
const OFF: [&str; 4] = ["disable", "disabled", "off", "revoked"];

/// The word of the note `state` for a key that is on, in any case.
const ACTIVE: &str = "active";

/// How much of a word that is not known is shown.
const SHOWN_CHARS: usize = 40;

/// Stands in the note `hold` between the version that is held and the newest one when that began.
const SINCE: &str = " since ";

/// Stands where a note was cut.
const CUT: &str = "...";

const STATE: &str = "state";
const USE_VERSION: &str = "use_version";
const HOLD: &str = "hold";
const FOR_VERSION: &str = "for_version";
const KEY_SHA256: &str = "key_sha256";
const UID: &str = "uid";

/// Notes of older versions, which mean nothing any more.
const OLD: [&str; 2] = ["pending_version", "pending_sha256"];

/// What polling compares: any difference means that the key changed.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct Metadata {
    /// Number of the newest version; 0: there is none yet.
    pub current_version: u64,
    versions: BTreeMap<u64, Version>,
    #[serde(rename = "custom_metadata")]
    notes: Option<HashMap<String, String>>,
    /// Counts the writes of the metadata, where the server checks it (OpenBao).
    #[serde(rename = "current_metadata_version")]
    pub(super) writes: Option<u64>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
struct Version {
    created_time: String,
    deletion_time: String,
    destroyed: bool,
}

/// What the note `state` says of a key. Authority.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NotedState<'a> {
    /// `active`, or no such note.
    Active,
    /// A word that switches the key off, as it was written.
    Disabled(&'a str),
    /// Any other word: somebody meant something by it, and until that is known the key signs nothing risk-increasing.
    Unknown(&'a str),
}

/// A version that an admin holds in use in place of the newest (`keys rollback`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Hold {
    /// The version that is held.
    pub(crate) version: u64,
    /// The newest version that is there.
    pub(crate) newest: u64,
    /// The newest version that was written after the hold began, if there is one and its beginning is noted.
    pub(crate) later: Option<u64>,
}

/// What is told of a state word that is not known.
pub(crate) fn unknown_state(word: &str) -> String {
    let shown: String = word.chars().take(SHOWN_CHARS).collect();
    format!(
        "its custom metadata says state={shown:?}, which is neither active nor disabled; risk-increasing requests are refused"
    )
}

impl Metadata {
    /// Whether an admin has switched the key on or off. Authority.
    pub fn state(&self) -> NotedState<'_> {
        let Some(word) = self.note(STATE).map(str::trim) else {
            return NotedState::Active;
        };
        let is = |known: &str| word.eq_ignore_ascii_case(known);
        if is(ACTIVE) {
            NotedState::Active
        } else if OFF.into_iter().any(is) {
            NotedState::Disabled(word)
        } else {
            NotedState::Unknown(word)
        }
    }

    /// The version that an admin holds in use; none where it is the newest one, or not there.
    pub(crate) fn hold(&self) -> Option<Hold> {
        let version = self
            .use_version()?
            .parse()
            .ok()
            .filter(|&version| self.has(version))?;
        let newest = self.before(u64::MAX).filter(|newest| *newest != version)?;
        // A note of an earlier hold says nothing of this one.
        let began_at = |note: &str| {
            let (held, newest) = note.split_once(SINCE)?;
            let is_this = held.parse::<u64>().ok() == Some(version);
            newest.parse::<u64>().ok().filter(|_| is_this)
        };
        let began_at = self.note(HOLD).and_then(began_at);
        Some(Hold {
            version,
            newest,
            later: began_at.and_then(|began_at| Some(newest).filter(|newest| *newest > began_at)),
        })
    }

    /// The version that an admin wants used in place of the newest, as it is noted. Authority.
    pub fn use_version(&self) -> Option<&str> {
        self.note(USE_VERSION)
    }

    /// The wanted version: the newest one, unless an admin has named another (`keys rollback`).
    ///
    /// # Errors
    /// When the version that is named is none that Vault has.
    pub(crate) fn wanted(&self) -> Result<u64, String> {
        let Some(named) = self.use_version() else {
            return Ok(self.current_version);
        };
        match named.parse() {
            Ok(version) if self.has(version) => Ok(version),
            _ => Err(format!(
                "its custom metadata says use_version={named}, and Vault has no such version; see `credbroker keys rollback`"
            )),
        }
    }

    /// Whether `version` is as it was `seen`.
    pub(crate) fn is_same(&self, seen: &Self, version: u64) -> bool {
        self.versions.get(&version) == seen.versions.get(&version)
    }

    /// Whether `version` has been taken away since it was `seen`: deleted or destroyed, or all was deleted and counting
    /// started over. That an old version is pruned when a new one is written takes nothing away.
    pub(crate) fn has_taken_away(&self, seen: &Self, version: u64) -> bool {
        if self.began_anew(seen) {
            return true;
        }
        match self.versions.get(&version) {
            Some(found) => {
                !self.is_same(seen, version) && (found.destroyed || !found.deletion_time.is_empty())
            }
            None => self.current_version < version,
        }
    }

    /// Whether a version that was `seen` is another one of the same number now.
    fn began_anew(&self, seen: &Self) -> bool {
        seen.versions.iter().any(|(number, seen)| {
            let found = self.versions.get(number);
            found.is_some_and(|found| found.created_time != seen.created_time)
        })
    }

    /// Whether a version is there and neither deleted nor destroyed; one that is to be deleted some day counts as deleted.
    pub(crate) fn has(&self, version: u64) -> bool {
        self.versions
            .get(&version)
            .is_some_and(|version| version.deletion_time.is_empty() && !version.destroyed)
    }

    /// The newest version below `version` that is there.
    pub(crate) fn before(&self, version: u64) -> Option<u64> {
        let mut older = self.versions.range(..version).map(|(number, _)| *number);
        older.rfind(|number| self.has(*number))
    }

    /// Whether a version has a time at which it deletes itself; nothing in the metadata changes then.
    pub(crate) fn deletes_itself(&self, version: u64) -> bool {
        self.versions
            .get(&version)
            .is_some_and(|version| !version.deletion_time.is_empty())
    }

    /// When a version was written, as Vault writes it (RFC 3339).
    pub fn created(&self, version: u64) -> Option<&str> {
        let version = self.versions.get(&version)?;
        Some(&version.created_time)
    }

    /// The version that the hints tell of. Where it is not the one in use, they are stale.
    pub fn for_version(&self) -> Option<u64> {
        self.note(FOR_VERSION)?.parse().ok()
    }

    /// Hint: KuCoin's number of the account.
    pub fn uid(&self) -> Option<&str> {
        self.note(UID)
    }

    /// Hint: SHA-256 of the key's id, in hex.
    pub fn key_sha256(&self) -> Option<&str> {
        self.note(KEY_SHA256)
    }

    /// Any note by its name.
    pub fn note(&self, name: &str) -> Option<&str> {
        self.notes.as_ref()?.get(name).map(String::as_str)
    }

    /// Where there is no key yet. A server that counts makes its metadata once then; one that does not, ignores the 0.
    pub(super) fn of_nothing() -> Self {
        Self {
            writes: Some(0),
            ..Self::default()
        }
    }

    /// All notes, with these changes.
    pub(super) fn noted(&self, changes: &Notes) -> BTreeMap<String, String> {
        let mut notes: BTreeMap<_, _> = self
            .notes
            .iter()
            .flatten()
            .map(|(name, text)| (name.clone(), text.clone()))
            .collect();
        for (&name, text) in &changes.0 {
            match text {
                Some(text) => notes.insert(name.to_owned(), text.clone()),
                None => notes.remove(name),
            };
        }
        notes
    }

    /// Whether all of these changes are made.
    pub(super) fn shows(&self, changes: &Notes) -> bool {
        let is_made = |(name, text): (&&str, &Option<String>)| self.note(name) == text.as_deref();
        changes.0.iter().all(is_made)
    }
}

/// What was found out about a key when it was registered; nothing of it is secret.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct StoredFacts {
    /// KuCoin's number of the account.
    pub uid: String,
    /// KuCoin site, as the rules write it.
    pub site: String,
    /// Permissions in the words of KuCoin's page.
    pub permissions: Vec<String>,
    /// Addresses that may use the key; none: any.
    pub ip_whitelist: Vec<String>,
    /// When the key ends: Unix time in milliseconds. 0: never.
    pub expires_at_ms: i64,
    /// Who registered it.
    pub registered_by: String,
    /// When: Unix time in milliseconds.
    pub registered_at_ms: i64,
    /// SHA-256 of the key's id, in hex.
    pub key_sha256: String,
}

impl StoredFacts {
    /// By name, as text; empty: not known.
    pub(super) fn texts(&self) -> [(&'static str, String); 8] {
        let time = |ms: i64| match ms {
            0 => String::new(),
            ms => ms.to_string(),
        };
        [
            (UID, self.uid.clone()),
            ("site", self.site.clone()),
            ("permissions", self.permissions.join(",")),
            ("ip_whitelist", self.ip_whitelist.join(",")),
            ("expires_at_ms", time(self.expires_at_ms)),
            ("registered_by", self.registered_by.clone()),
            ("registered_at_ms", time(self.registered_at_ms)),
            (KEY_SHA256, self.key_sha256.clone()),
        ]
    }
}

/// Changes of the custom metadata of a key; what they do not name stays.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Notes(BTreeMap<&'static str, Option<String>>);

impl Notes {
    /// A version has been written, this is known of it, and it is the one to use.
    pub fn registered(version: u64, facts: &StoredFacts) -> Self {
        let mut notes = Self(OLD.map(|name| (name, None)).into());
        // What is not known of this version must not be read as the former one's.
        let known = |text: String| (!text.is_empty()).then(|| as_note(&text));
        let facts = facts.texts().map(|(name, text)| (name, known(text)));
        notes.0.extend(facts);
        notes.0.insert(FOR_VERSION, Some(version.to_string()));
        notes.0.extend(Self::newest().0);
        notes
    }

    /// Switches the key on or off.
    pub fn state(is_active: bool) -> Self {
        let state = if is_active { "active" } else { "disabled" };
        Self(BTreeMap::from([(STATE, Some(state.to_owned()))]))
    }

    /// These changes and others, in one write.
    #[must_use]
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// The newest version is to be used.
    pub(crate) fn newest() -> Self {
        Self(BTreeMap::from([(USE_VERSION, None), (HOLD, None)]))
    }

    /// This version is to be used, while `newest` is the newest one: what is written later may follow it once it is dead.
    pub fn hold(version: u64, newest: u64) -> Self {
        Self(BTreeMap::from([
            (USE_VERSION, Some(version.to_string())),
            (HOLD, Some(format!("{version}{SINCE}{newest}"))),
        ]))
    }

    /// Whichever version was to be used in `before`.
    pub(crate) fn as_before(before: &Metadata) -> Self {
        let note = |name| (name, before.note(name).map(str::to_owned));
        Self([USE_VERSION, HOLD].map(note).into())
    }
}

/// Fits a text to what Vault takes: printable, and not too long.
fn as_note(text: &str) -> String {
    let printable = |c: char| {
        if c == ' ' || c.is_ascii_graphic() {
            c
        } else {
            '?'
        }
    };
    let mut note: String = text.chars().map(printable).collect();
    if note.len() > MAX_NOTE_BYTES {
        note.truncate(MAX_NOTE_BYTES - CUT.len());
        note.push_str(CUT);
    }
    note
}

/// `GET <mount>/metadata/<path>`. The library has it too, but drops the number that a checked write needs.
pub(super) struct ReadMetadata {
    pub(super) mount: String,
    pub(super) path: String,
}

impl Endpoint for ReadMetadata {
    type Response = Metadata;
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        format!("{}/metadata/{}", self.mount, self.path)
    }

    fn method(&self) -> RequestMethod {
        RequestMethod::GET
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn metadata(notes: &serde_json::Value) -> Metadata {
        let version = json!({ "created_time": "2026-01-02T03:04:05Z", "deletion_time": "", "destroyed": false });
        let metadata =
            json!({ "current_version": 3, "versions": { "3": version }, "custom_metadata": notes });
        serde_json::from_value(metadata).unwrap()
    }

    #[test]
    fn notes_that_are_missing_or_strange_are_no_hints_and_a_strange_version_to_use_is_an_error() {
        let none = metadata(&serde_json::Value::Null);
        assert_eq!((none.uid(), none.for_version()), (None, None));
        assert_eq!(none.wanted(), Ok(3));
        assert_eq!((none.before(4), none.before(3)), (Some(3), None));
        assert_eq!(none.created(3), Some("2026-01-02T03:04:05Z"));
        let strange = metadata(&json!({ "for_version": "x", "use_version": "two" }));
        assert_eq!(strange.for_version(), None);
        let problem = strange.wanted().unwrap_err();
        assert!(problem.contains("use_version=two"), "{problem}");
        for gone in ["0", "2", "4"] {
            assert!(metadata(&json!({ "use_version": gone })).wanted().is_err());
        }
        assert_eq!(metadata(&json!({ "use_version": "3" })).wanted(), Ok(3));
    }

    #[test]
    fn state_word_is_read_in_any_case_and_an_unknown_one_is_not_taken_for_active() {
        let state = |word: &str| metadata(&json!({ "state": word }));
        assert_eq!(metadata(&json!({})).state(), NotedState::Active);
        for word in ["active", "Active", " ACTIVE "] {
            assert_eq!(state(word).state(), NotedState::Active);
        }
        for word in ["disabled", "Disable", "OFF", "revoked"] {
            assert_eq!(state(word).state(), NotedState::Disabled(word));
        }
        for word in ["paused", "", "disabled!", "inactive", "aktiv"] {
            assert_eq!(state(word).state(), NotedState::Unknown(word));
        }
        let hostile = unknown_state(&format!("\u{202e}\n\u{1b}[2J{}", "x".repeat(500)));
        assert!(
            hostile.len() < 250 && !hostile.contains(char::is_control),
            "{hostile}"
        );
        assert!(!hostile.contains('\u{202e}'), "{hostile}");
    }

    #[test]
    fn only_a_version_above_the_one_at_which_the_hold_began_is_later() {
        let version = json!({ "created_time": "2026-01-02T03:04:05Z", "deletion_time": "", "destroyed": false });
        let versions: HashMap<_, _> = (1..=4)
            .map(|number| (number.to_string(), &version))
            .collect();
        let found = |notes: serde_json::Value| {
            let metadata =
                json!({ "current_version": 4, "versions": versions, "custom_metadata": notes });
            let metadata: Metadata = serde_json::from_value(metadata).unwrap();
            metadata
                .hold()
                .map(|hold| (hold.version, hold.newest, hold.later))
        };
        let since = |since: &str| found(json!({ "use_version": "2", "hold": since }));
        assert_eq!(since("2 since 3"), Some((2, 4, Some(4))));
        assert_eq!(since("2 since 4"), Some((2, 4, None)));
        for strange in ["1 since 3", "2 since", "2 since x", "since 3", ""] {
            assert_eq!(since(strange), Some((2, 4, None)), "{strange}");
        }
        assert_eq!(found(json!({ "use_version": "2" })), Some((2, 4, None)));
        for none in ["4", "7", "two"] {
            assert_eq!(
                found(json!({ "use_version": none, "hold": "4 since 4" })),
                None
            );
        }
        assert_eq!(found(json!({ "hold": "2 since 3" })), None);
    }

    #[test]
    fn a_registration_replaces_all_that_was_known_of_the_version_before_and_nothing_else() {
        let before = metadata(&json!({
            "owner": "desk", "state": "active", "use_version": "2", "hold": "2 since 3", "uid": "1", "ip_whitelist": "192.0.2.1",
            "for_version": "2", "pending_version": "3", "pending_sha256": "ab",
        }));
        let facts = StoredFacts {
            uid: "1001".to_owned(),
            key_sha256: "ab".to_owned(),
            ..StoredFacts::default()
        };
        let registered = Notes::registered(3, &facts);
        assert!(!before.shows(&registered));
        let after = json!({
            "owner": "desk", "state": "active", "uid": "1001", "key_sha256": "ab", "for_version": "3",
        });
        assert_eq!(json!(before.noted(&registered)), after);
        assert!(metadata(&after).shows(&registered));
    }

    #[test]
    fn a_note_fits_into_what_vault_takes() {
        assert_eq!(as_note("spot, futures"), "spot, futures");
        assert_eq!(as_note("a\u{200b}b\nc\u{e4}"), "a?b?c?");
        let long = as_note(&"\u{e4}".repeat(513));
        assert_eq!((long.len(), long.ends_with("??...")), (512, true));
        assert_eq!(as_note(&"x".repeat(512)), "x".repeat(512));
    }
}
