//! KV version 2: versions, metadata, check-and-set, soft delete, destroy.
//!
//! Not simulated, and rejected: PATCH, `delete_version_after` and `metadata_cas_required`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::answer::{Answer, Logical, Outcome, Refusal};
use super::clock::rfc3339;
use super::request::{Fields, Operation, Request};

/// How many versions of a path are kept, unless its metadata or the mount sets another number.
const DEFAULT_MAX_VERSIONS: u64 = 10;

/// The fields of a metadata write; a write with none of them changes nothing and creates no path.
const METADATA: [&str; 5] = [
    "cas_required",
    "custom_metadata",
    "delete_version_after",
    "max_versions",
    "metadata_cas_required",
];

/// One mount.
#[derive(Default)]
pub(super) struct Kv {
    cas_required: bool,
    max_versions: u64,
    secrets: BTreeMap<String, Secret>,
}

/// One path with all its versions.
struct Secret {
    cas_required: bool,
    created: SystemTime,
    current_version: u64,
    custom_metadata: Option<BTreeMap<String, String>>,
    max_versions: u64,
    metadata_version: u64,
    oldest_version: u64,
    updated: SystemTime,
    versions: BTreeMap<u64, Version>,
}

struct Version {
    created: SystemTime,
    data: Value,
    deleted: Option<SystemTime>,
    destroyed: bool,
}

impl Secret {
    fn new(now: SystemTime) -> Self {
        Self {
            cas_required: false,
            created: now,
            current_version: 0,
            custom_metadata: None,
            max_versions: 0,
            metadata_version: 0,
            oldest_version: 0,
            updated: now,
            versions: BTreeMap::new(),
        }
    }

    fn metadata(&self) -> Value {
        let versions: Map<_, _> = self
            .versions
            .iter()
            .map(|(number, version)| (number.to_string(), version.times()))
            .collect();
        json!({
            "cas_required": self.cas_required,
            "created_time": rfc3339(self.created),
            "current_metadata_version": self.metadata_version,
            "current_version": self.current_version,
            "custom_metadata": self.custom_metadata,
            "delete_version_after": "0s",
            "max_versions": self.max_versions,
            "metadata_cas_required": false,
            "oldest_version": self.oldest_version,
            "updated_time": rfc3339(self.updated),
            "versions": versions,
        })
    }

    fn version_metadata(&self, number: u64, version: &Version) -> Value {
        json!({
            "created_time": rfc3339(version.created),
            "custom_metadata": self.custom_metadata,
            "deletion_time": version.deletion_time(),
            "destroyed": version.destroyed,
            "version": number,
        })
    }

    fn prune(&mut self, mount_max: u64) {
        let max = [self.max_versions, mount_max]
            .into_iter()
            .find(|max| *max > 0)
            .unwrap_or(DEFAULT_MAX_VERSIONS);
        while self.versions.len() as u64 > max {
            self.versions.pop_first();
            self.oldest_version = self.versions.keys().next().copied().unwrap_or(0);
        }
    }
}

impl Version {
    fn deletion_time(&self) -> String {
        self.deleted.map(rfc3339).unwrap_or_default()
    }

    fn times(&self) -> Value {
        json!({
            "created_time": rfc3339(self.created),
            "deletion_time": self.deletion_time(),
            "destroyed": self.destroyed,
        })
    }
}

impl Kv {
    /// Answers requests below the mount; `path` is relative to it.
    pub(super) fn handle(&mut self, path: &str, request: &Request) -> Outcome {
        let (area, secret) = path.split_once('/').unwrap_or((path, ""));
        match (area, request.operation) {
            ("config", Operation::Read) => Ok(self.config()),
            ("config", Operation::Write) => self.configure(&request.body),
            ("metadata", Operation::List) => self.list(secret),
            ("data" | "metadata" | "delete" | "undelete" | "destroy", _) if secret.is_empty() => {
                Err(Refusal::unsupported_operation())
            }
            ("data", Operation::Delete) => {
                self.delete_latest(secret, request.now);
                Ok(Answer::Empty)
            }
            ("data", Operation::Read) => self.read(secret, request),
            ("data", Operation::Write) => self.write(secret, request),
            ("metadata", Operation::Delete) => {
                self.delete_metadata(secret);
                Ok(Answer::Empty)
            }
            ("metadata", Operation::Read) => {
                let found = self.secrets.get(secret).ok_or_else(Refusal::missing)?;
                Ok(Logical::data(found.metadata()).into())
            }
            ("metadata", Operation::Write) => self.write_metadata(secret, request),
            ("delete", Operation::Write) => self.each_version(secret, request, |version, now| {
                version.deleted = version.deleted.or(Some(now));
            }),
            ("undelete", Operation::Write) => {
                self.each_version(secret, request, |version, _| version.deleted = None)
            }
            ("destroy", Operation::Write) => self.each_version(secret, request, |version, _| {
                version.data = Value::Null;
                version.destroyed = true;
            }),
            ("config" | "data" | "metadata" | "delete" | "undelete" | "destroy", _) => {
                Err(Refusal::unsupported_operation())
            }
            _ => not_versioned(request.operation),
        }
    }

    /// Writes a version; returns its number and the answer's data.
    pub(super) fn put(&mut self, path: &str, data: Value, now: SystemTime) -> (u64, Value) {
        let secret = self
            .secrets
            .entry(path.to_owned())
            .or_insert_with(|| Secret::new(now));
        secret.current_version += 1;
        secret.updated = now;
        let version = Version {
            created: now,
            data,
            deleted: None,
            destroyed: false,
        };
        let answer = secret.version_metadata(secret.current_version, &version);
        secret.versions.insert(secret.current_version, version);
        secret.prune(self.max_versions);
        (secret.current_version, answer)
    }

    /// Replaces the custom metadata of a path. Creates the path if needed.
    pub(super) fn set_custom_metadata(
        &mut self,
        path: &str,
        custom: BTreeMap<String, String>,
        now: SystemTime,
    ) {
        let secret = self
            .secrets
            .entry(path.to_owned())
            .or_insert_with(|| Secret::new(now));
        secret.custom_metadata = Some(custom);
        secret.metadata_version += 1;
        secret.updated = now;
    }

    /// Soft-deletes the newest version, if there is one that is not deleted.
    pub(super) fn delete_latest(&mut self, path: &str, now: SystemTime) {
        if let Some(secret) = self.secrets.get_mut(path)
            && let Some(version) = secret.versions.get_mut(&secret.current_version)
        {
            version.deleted = version.deleted.or(Some(now));
        }
    }

    /// Deletes a path with all its versions; the next version is 1.
    pub(super) fn delete_metadata(&mut self, path: &str) {
        self.secrets.remove(path);
    }

    fn config(&self) -> Answer {
        let config = json!({
            "cas_required": self.cas_required,
            "delete_version_after": "0s",
            "max_versions": self.max_versions,
            "metadata_cas_required": false,
        });
        Logical::data(config).into()
    }

    fn configure(&mut self, body: &Fields) -> Outcome {
        reject_unsimulated(body)?;
        self.cas_required = body.flag("cas_required").unwrap_or(self.cas_required);
        self.max_versions = body.number("max_versions").unwrap_or(self.max_versions);
        Ok(Answer::Empty)
    }

    fn list(&self, folder: &str) -> Outcome {
        let prefix = if folder.is_empty() {
            String::new()
        } else {
            format!("{folder}/")
        };
        let keys: BTreeSet<String> = self
            .secrets
            .keys()
            .filter_map(|path| path.strip_prefix(&prefix))
            .map(|rest| match rest.split_once('/') {
                Some((folder, _)) => format!("{folder}/"),
                None => rest.to_owned(),
            })
            .collect();
        if keys.is_empty() {
            return Err(Refusal::missing());
        }
        Ok(Logical::data(json!({ "keys": keys })).into())
    }

    fn read(&self, path: &str, request: &Request) -> Outcome {
        let secret = self.secrets.get(path).ok_or_else(Refusal::missing)?;
        let requested = match request.query("version") {
            None | Some("") => 0,
            Some(text) => text.parse().map_err(|_| {
                Refusal::bad_request("error converting input for field \"version\"")
            })?,
        };
        let number = if requested == 0 {
            secret.current_version
        } else {
            requested
        };
        let version = secret.versions.get(&number).ok_or_else(Refusal::missing)?;
        let is_deleted = version.destroyed || version.deleted.is_some();
        let mut answer = Logical::data(json!({
            "data": if is_deleted { &Value::Null } else { &version.data },
            "metadata": secret.version_metadata(number, version),
        }));
        if is_deleted {
            answer.status = 404;
        }
        Ok(answer.into())
    }

    fn write(&mut self, path: &str, request: &Request) -> Outcome {
        let body = &request.body;
        let data = body
            .get("data")
            .ok_or_else(|| Refusal::bad_request("no data provided"))?;
        if !data.is_object() && !data.is_null() {
            return Err(not_an_object("data", data));
        }
        let secret = self.secrets.get(path);
        let cas = body.get("options").and_then(|options| options.get("cas"));
        match cas.map(check_and_set).transpose()? {
            None if self.cas_required || secret.is_some_and(|secret| secret.cas_required) => {
                return Err(Refusal::bad_request(
                    "check-and-set parameter required for this call",
                ));
            }
            Some(cas) if cas != secret.map_or(0, |secret| i128::from(secret.current_version)) => {
                return Err(Refusal::bad_request(
                    "check-and-set parameter did not match the current version",
                ));
            }
            _ => {}
        }
        let (_, answer) = self.put(path, data.clone(), request.now);
        Ok(Logical::data(answer).into())
    }

    fn write_metadata(&mut self, path: &str, request: &Request) -> Outcome {
        let body = &request.body;
        reject_unsimulated(body)?;
        if METADATA.iter().all(|name| body.get(name).is_none()) {
            return Ok(Answer::Empty);
        }
        let custom = body
            .get("custom_metadata")
            .map(custom_metadata)
            .transpose()?;
        let known = self.secrets.get(path);
        if let Some(cas) = body.get("metadata_cas")
            && as_number(cas) != Some(known.map_or(0, |secret| secret.metadata_version))
        {
            return Err(Refusal::bad_request(
                "metadata check-and-set parameter does not match the current version",
            ));
        }
        let secret = self
            .secrets
            .entry(path.to_owned())
            .or_insert_with(|| Secret::new(request.now));
        secret.cas_required = body.flag("cas_required").unwrap_or(secret.cas_required);
        secret.max_versions = body.number("max_versions").unwrap_or(secret.max_versions);
        if let Some(custom) = custom {
            secret.custom_metadata = custom;
        }
        secret.metadata_version += 1;
        secret.updated = request.now;
        Ok(Answer::Empty)
    }

    fn each_version(
        &mut self,
        path: &str,
        request: &Request,
        change: impl Fn(&mut Version, SystemTime),
    ) -> Outcome {
        let numbers: Vec<u64> = match request.body.get("versions") {
            Some(Value::Array(numbers)) => numbers.iter().filter_map(as_number).collect(),
            _ => Vec::new(),
        };
        if numbers.is_empty() {
            return Err(Refusal::bad_request("no version number provided"));
        }
        let Some(secret) = self.secrets.get_mut(path) else {
            return Ok(Answer::Empty);
        };
        for (_, version) in secret
            .versions
            .iter_mut()
            .filter(|(number, version)| numbers.contains(number) && !version.destroyed)
        {
            change(version, request.now);
        }
        Ok(Answer::Empty)
    }
}

/// A number, or a string with a number: the server accepts both.
fn as_number(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// The number of a check-and-set: every value that the server can convert. A negative one matches no version.
fn check_and_set(value: &Value) -> Result<i128, Refusal> {
    let number = match value {
        Value::Null => Some(0),
        Value::Bool(flag) => Some(i128::from(*flag)),
        Value::Number(number) => number.as_i64().map(i128::from),
        Value::String(text) if text.is_empty() => Some(0),
        Value::String(text) => text.parse().ok(),
        Value::Array(_) | Value::Object(_) => None,
    };
    number.ok_or_else(|| Refusal::bad_request("error parsing check-and-set parameter"))
}

/// The Go type name that the server's errors contain.
fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Array(_) => "[]interface {}",
        Value::Bool(_) => "bool",
        Value::Null => "nil",
        Value::Number(_) => "json.Number",
        Value::Object(_) => "map[string]interface {}",
        Value::String(_) => "string",
    }
}

fn not_an_object(field: &str, value: &Value) -> Refusal {
    Refusal::bad_request(format!(
        "error converting input for field {field:?}: '' expected type 'map[string]interface {{}}', \
         got unconvertible type '{}'",
        kind_of(value)
    ))
}

fn reject_unsimulated(body: &Fields) -> Result<(), Refusal> {
    let delay = body.duration("delete_version_after")?.unwrap_or_default();
    if !delay.is_zero() || body.flag("metadata_cas_required") == Some(true) {
        return Err(Refusal::bad_request(
            "simulator: delete_version_after and metadata_cas_required are not simulated",
        ));
    }
    Ok(())
}

/// Converts numbers and booleans to strings, and checks the server's limits: 64 pairs, names of 1 to 128 bytes, values of 1
/// to 512 bytes, only printable characters. An empty map counts as `None`.
fn custom_metadata(value: &Value) -> Result<Option<BTreeMap<String, String>>, Refusal> {
    const PROBLEM: &str = "custom_metadata validation failed";
    let pairs = match value {
        Value::Null => return Ok(None),
        Value::Object(pairs) => pairs,
        other => return Err(not_an_object("custom_metadata", other)),
    };
    let mut custom = BTreeMap::new();
    for (name, value) in pairs {
        let text = match value {
            Value::Bool(flag) => u8::from(*flag).to_string(),
            Value::Null => String::new(),
            Value::Number(number) => number.to_string(),
            Value::String(text) => text.clone(),
            Value::Array(_) | Value::Object(_) => {
                return Err(Refusal::bad_request(format!(
                    "{PROBLEM}: '' expected type 'string', got unconvertible type '{}'",
                    kind_of(value)
                )));
            }
        };
        custom.insert(name.clone(), text);
    }
    let mut problems = Vec::new();
    if custom.len() > 64 {
        problems.push(format!(
            "{PROBLEM}: payload must contain at most 64 keys, provided {}",
            custom.len()
        ));
    }
    for (name, value) in &custom {
        if !(1..=128).contains(&name.len()) {
            problems.push(format!(
                "{PROBLEM}: length of key {name:?} is {} but must be 0 < len(key) <= 128",
                name.len()
            ));
        }
        if !(1..=512).contains(&value.len()) {
            problems.push(format!(
                "{PROBLEM}: length of value for key {name:?} is {} but must be 0 < len(value) <= 512",
                value.len()
            ));
        }
        if !name.chars().all(is_printable) {
            problems.push(format!(
                "{PROBLEM}: key {name:?} ({name}) contains unprintable characters"
            ));
        }
        if !value.chars().all(is_printable) {
            problems.push(format!(
                "{PROBLEM}: value for key {name:?} contains unprintable characters"
            ));
        }
    }
    if problems.is_empty() {
        return Ok(Some(custom).filter(|custom| !custom.is_empty()));
    }
    let count = match problems.len() {
        1 => "1 error".to_owned(),
        count => format!("{count} errors"),
    };
    let problems = problems.join("\n\t* ");
    Err(Refusal::bad_request(format!(
        "{count} occurred:\n\t* {problems}\n\n"
    )))
}

/// Letters, marks, numbers, punctuation, symbols and the space; approximates the server's own list.
fn is_printable(c: char) -> bool {
    let invisible = matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{2064}' | '\u{feff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || invisible)
}

/// The answer for a path without `data/`, as version 1 has them.
fn not_versioned(operation: Operation) -> Outcome {
    let command = match operation {
        Operation::Delete => "delete",
        Operation::List => "list",
        Operation::Other => return Err(Refusal::unsupported_operation()),
        Operation::Read => "get",
        Operation::Write => "put",
    };
    let mut answer = Logical::data(Value::Null);
    answer.status = 404;
    answer.warnings = vec![format!(
        "Invalid path for a versioned K/V secrets engine. See the API docs for the appropriate API \
         endpoints to use. If using the OpenBao CLI, use 'bao kv {command}' for this operation."
    )];
    Ok(answer.into())
}
