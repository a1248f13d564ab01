//! The metadata of a key in Vault: its versions and its custom metadata, whose entries are called notes here.
//!
//! The broker acts on the notes `state`, `use_version` and `hold` (when `use_version` was set). The others are informational:
//! facts about the version that was registered last (`for_version`).

use std::collections::{BTreeMap, HashMap};

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use serde::Deserialize;

/// How many entries of custom metadata Vault allows per key.
pub(super) const MAX_NOTES: usize = 64;

/// The longest value of an entry, in bytes.
const MAX_NOTE_BYTES: usize = 512;

/// Values of `state` that disable a key; case is ignored.
const OFF: [&str; 4] = ["disable", "disabled", "off", "revoked"];

/// The value of `state` for an enabled key; case is ignored.
const ACTIVE: &str = "active";

/// How many characters of an unknown `state` are shown.
const SHOWN_CHARS: usize = 40;

/// Separates, in `hold`, the held version from the newest version at that time.
const SINCE: &str = " since ";

/// Marks a value that was cut.
const CUT: &str = "...";

const STATE: &str = "state";
const USE_VERSION: &str = "use_version";
const HOLD: &str = "hold";
const FOR_VERSION: &str = "for_version";
const KEY_SHA256: &str = "key_sha256";
const UID: &str = "uid";

/// Notes of earlier releases of credbroker, no longer used.
const OLD: [&str; 2] = ["pending_version", "pending_sha256"];

/// The metadata of a key; polls compare them to detect changes.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq)]
pub struct Metadata {
    /// Number of the newest version; 0: none yet.
    pub current_version: u64,
    versions: BTreeMap<u64, Version>,
    #[serde(rename = "custom_metadata")]
    notes: Option<HashMap<String, String>>,
    /// How often the metadata were written, if the server supports check-and-set for them (OpenBao).
    #[serde(rename = "current_metadata_version")]
    pub(super) writes: Option<u64>,
}

#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
struct Version {
    created_time: String,
    deletion_time: String,
    destroyed: bool,
}

/// The note `state` of a key.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum StoredState<'a> {
    /// `active`, or no `state`.
    Active,
    /// A value that disables the key, as it was written.
    Disabled(&'a str),
    /// Any other value: until an admin corrects it, the key signs nothing risk-increasing.
    Unknown(&'a str),
}

/// A version that an admin holds instead of the newest (`keys rollback`).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Hold {
    /// The held version.
    pub(crate) version: u64,
    /// The newest version that exists.
    pub(crate) newest: u64,
    /// The newest version, if it was written after the hold began; none if `hold` does not record when that was.
    pub(crate) later: Option<u64>,
}

/// The message for an unknown `state`.
pub(crate) fn unknown_state(word: &str) -> String {
    let shown: String = word.chars().take(SHOWN_CHARS).collect();
    format!(
        "its custom metadata has state={shown:?}, which is neither active nor disabled; risk-increasing requests are refused"
    )
}

impl Metadata {
    /// Whether an admin has enabled or disabled the key.
    pub fn state(&self) -> StoredState<'_> {
        let Some(word) = self.note(STATE).map(str::trim) else {
            return StoredState::Active;
        };
        let is = |known: &str| word.eq_ignore_ascii_case(known);
        if is(ACTIVE) {
            StoredState::Active
        } else if OFF.into_iter().any(is) {
            StoredState::Disabled(word)
        } else {
            StoredState::Unknown(word)
        }
    }

    /// The version that an admin holds; none if it is the newest one or does not exist.
    pub(crate) fn hold(&self) -> Option<Hold> {
        let version = self
            .use_version()?
            .parse()
            .ok()
            .filter(|&version| self.has(version))?;
        let newest = self.before(u64::MAX).filter(|newest| *newest != version)?;
        // Ignore the note of an earlier hold.
        let newest_then = |note: &str| {
            let (held, newest) = note.split_once(SINCE)?;
            let is_this = held.parse::<u64>().ok() == Some(version);
            newest.parse::<u64>().ok().filter(|_| is_this)
        };
        let newest_then = self.note(HOLD).and_then(newest_then);
        Some(Hold {
            version,
            newest,
            later: newest_then.and_then(|then| Some(newest).filter(|newest| *newest > then)),
        })
    }

    /// The note `use_version`: which version to use instead of the newest.
    pub fn use_version(&self) -> Option<&str> {
        self.note(USE_VERSION)
    }

    /// The wanted version: the newest one, unless an admin has set another (`keys rollback`).
    ///
    /// # Errors
    /// When Vault does not have the version that was set.
    pub(crate) fn wanted(&self) -> Result<u64, String> {
        let Some(named) = self.use_version() else {
            return Ok(self.current_version);
        };
        match named.parse() {
            Ok(version) if self.has(version) => Ok(version),
            _ => Err(format!(
                "its custom metadata has use_version={named}, but Vault has no such version; set another with `credbroker keys rollback`"
            )),
        }
    }

    /// Whether `version` has not changed since `seen`.
    pub(crate) fn is_same(&self, seen: &Self, version: u64) -> bool {
        self.versions.get(&version) == seen.versions.get(&version)
    }

    /// Whether `version` was deleted or destroyed since `seen`, or all versions were deleted and numbering restarted. A
    /// version that Vault prunes when a new one is written does not count.
    pub(crate) fn has_lost(&self, seen: &Self, version: u64) -> bool {
        if self.has_restarted(seen) {
            return true;
        }
        match self.versions.get(&version) {
            Some(found) => {
                !self.is_same(seen, version) && (found.destroyed || !found.deletion_time.is_empty())
            }
            None => self.current_version < version,
        }
    }

    /// Whether numbering has restarted since `seen`: a number now belongs to a different version.
    fn has_restarted(&self, seen: &Self) -> bool {
        seen.versions.iter().any(|(number, seen)| {
            let found = self.versions.get(number);
            found.is_some_and(|found| found.created_time != seen.created_time)
        })
    }

    /// Whether a version exists and is neither deleted nor destroyed; one with a deletion time counts as deleted.
    pub(crate) fn has(&self, version: u64) -> bool {
        self.versions
            .get(&version)
            .is_some_and(|version| version.deletion_time.is_empty() && !version.destroyed)
    }

    /// The newest version below `version` that exists.
    pub(crate) fn before(&self, version: u64) -> Option<u64> {
        let mut older = self.versions.range(..version).map(|(number, _)| *number);
        older.rfind(|number| self.has(*number))
    }

    /// Whether a version has a deletion time; the metadata do not change when Vault deletes it then.
    pub(crate) fn has_deletion_time(&self, version: u64) -> bool {
        self.versions
            .get(&version)
            .is_some_and(|version| !version.deletion_time.is_empty())
    }

    /// When a version was written, as Vault returns it (RFC 3339).
    pub fn created(&self, version: u64) -> Option<&str> {
        let version = self.versions.get(&version)?;
        Some(&version.created_time)
    }

    /// The version that the informational notes describe. If another is in use, they are stale.
    pub fn for_version(&self) -> Option<u64> {
        self.note(FOR_VERSION)?.parse().ok()
    }

    /// Informational: KuCoin's id of the account.
    pub fn uid(&self) -> Option<&str> {
        self.note(UID)
    }

    /// Informational: SHA-256 of the key's id, in hex.
    pub fn key_sha256(&self) -> Option<&str> {
        self.note(KEY_SHA256)
    }

    /// Any note by its name.
    pub fn note(&self, name: &str) -> Option<&str> {
        self.notes.as_ref()?.get(name).map(String::as_str)
    }

    /// For a key that does not exist yet. A server with check-and-set for metadata then creates them only once; others
    /// ignore the 0.
    pub(super) fn of_nothing() -> Self {
        Self {
            writes: Some(0),
            ..Self::default()
        }
    }

    /// All notes after these changes.
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

    /// Whether all these changes are already made.
    pub(super) fn shows(&self, changes: &Notes) -> bool {
        let is_made = |(name, text): (&&str, &Option<String>)| self.note(name) == text.as_deref();
        changes.0.iter().all(is_made)
    }
}

/// Facts about a key, stored at its registration; none is secret.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct StoredFacts {
    /// KuCoin's id of the account.
    pub uid: String,
    /// KuCoin site, as in the rules.
    pub site: String,
    /// Permissions, as on KuCoin's page.
    pub permissions: Vec<String>,
    /// Addresses that may use the key; empty: any address.
    pub ip_whitelist: Vec<String>,
    /// When the key expires: Unix time in milliseconds. 0: never.
    pub expires_at_ms: i64,
    /// Who registered it.
    pub registered_by: String,
    /// When: Unix time in milliseconds.
    pub registered_at_ms: i64,
    /// SHA-256 of the key's id, in hex.
    pub key_sha256: String,
}

impl StoredFacts {
    /// Names and texts; empty: unknown.
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

/// Changes of the custom metadata of a key; other entries stay.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Notes(BTreeMap<&'static str, Option<String>>);

impl Notes {
    /// After a registration: describes the new version, and makes it the one to use.
    pub fn registered(version: u64, facts: &StoredFacts) -> Self {
        let mut notes = Self(OLD.map(|name| (name, None)).into());
        // Unknown facts are removed, so that none of the previous version remain.
        let known = |text: String| (!text.is_empty()).then(|| as_note(&text));
        let facts = facts.texts().map(|(name, text)| (name, known(text)));
        notes.0.extend(facts);
        notes.0.insert(FOR_VERSION, Some(version.to_string()));
        notes.0.extend(Self::newest().0);
        notes
    }

    /// Enables or disables the key.
    pub fn state(is_active: bool) -> Self {
        let state = if is_active { "active" } else { "disabled" };
        Self(BTreeMap::from([(STATE, Some(state.to_owned()))]))
    }

    /// Both sets of changes, in one write.
    #[must_use]
    pub(crate) fn and(mut self, others: Self) -> Self {
        self.0.extend(others.0);
        self
    }

    /// Uses the newest version.
    pub(crate) fn newest() -> Self {
        Self(BTreeMap::from([(USE_VERSION, None), (HOLD, None)]))
    }

    /// Holds this version while `newest` is the newest: only versions written later may replace it, if it is rejected.
    pub fn hold(version: u64, newest: u64) -> Self {
        Self(BTreeMap::from([
            (USE_VERSION, Some(version.to_string())),
            (HOLD, Some(format!("{version}{SINCE}{newest}"))),
        ]))
    }

    /// Restores the version to use from `before`.
    pub(crate) fn as_before(before: &Metadata) -> Self {
        let note = |name| (name, before.note(name).map(str::to_owned));
        Self([USE_VERSION, HOLD].map(note).into())
    }
}

/// Converts a text to a value that Vault accepts: printable and not too long.
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

/// `GET <mount>/metadata/<path>`. The library has it too, but drops the number that a check-and-set write needs.
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
    fn missing_or_invalid_notes_are_ignored_but_an_invalid_use_version_is_an_error() {
        let none = metadata(&serde_json::Value::Null);
        assert_eq!((none.uid(), none.for_version()), (None, None));
        assert_eq!(none.wanted(), Ok(3));
        assert_eq!((none.before(4), none.before(3)), (Some(3), None));
        assert_eq!(none.created(3), Some("2026-01-02T03:04:05Z"));
        let invalid = metadata(&json!({ "for_version": "x", "use_version": "two" }));
        assert_eq!(invalid.for_version(), None);
        let problem = invalid.wanted().unwrap_err();
        assert!(problem.contains("use_version=two"), "{problem}");
        for gone in ["0", "2", "4"] {
            assert!(metadata(&json!({ "use_version": gone })).wanted().is_err());
        }
        assert_eq!(metadata(&json!({ "use_version": "3" })).wanted(), Ok(3));
    }

    #[test]
    fn state_ignores_case_and_an_unknown_value_is_not_active() {
        let state = |word: &str| metadata(&json!({ "state": word }));
        assert_eq!(metadata(&json!({})).state(), StoredState::Active);
        for word in ["active", "Active", " ACTIVE "] {
            assert_eq!(state(word).state(), StoredState::Active);
        }
        for word in ["disabled", "Disable", "OFF", "revoked"] {
            assert_eq!(state(word).state(), StoredState::Disabled(word));
        }
        for word in ["paused", "", "disabled!", "inactive", "aktiv"] {
            assert_eq!(state(word).state(), StoredState::Unknown(word));
        }
        let hostile = unknown_state(&format!("\u{202e}\n\u{1b}[2J{}", "x".repeat(500)));
        assert!(
            hostile.len() < 250 && !hostile.contains(char::is_control),
            "{hostile}"
        );
        assert!(!hostile.contains('\u{202e}'), "{hostile}");
    }

    #[test]
    fn only_versions_written_after_the_hold_began_count_as_later() {
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
        for invalid in ["1 since 3", "2 since", "2 since x", "since 3", ""] {
            assert_eq!(since(invalid), Some((2, 4, None)), "{invalid}");
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
    fn registration_replaces_the_facts_of_the_previous_version_and_nothing_else() {
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
    fn note_is_made_printable_and_cut_to_what_vault_accepts() {
        assert_eq!(as_note("spot, futures"), "spot, futures");
        assert_eq!(as_note("a\u{200b}b\nc\u{e4}"), "a?b?c?");
        let long = as_note(&"\u{e4}".repeat(513));
        assert_eq!((long.len(), long.ends_with("??...")), (512, true));
        assert_eq!(as_note(&"x".repeat(512)), "x".repeat(512));
    }
}
