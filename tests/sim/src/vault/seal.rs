//! Initialisation, seal, unseal and health.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::answer::{Answer, Outcome, Refusal};
use super::clock::unix_s;
use super::ids::{Ids, hex};
use super::request::{Operation, Request};

/// The version that the simulated server reports.
pub(super) const VERSION: &str = "2.0.0-simulated";

/// The seal of the storage. Any `threshold` of the shares unseal it.
pub(super) struct Seal {
    cluster_id: String,
    entered: Vec<Vec<u8>>,
    nonce: String,
    /// Whether the storage is "file"; otherwise a dev server, in memory.
    pub(super) file: bool,
    pub(super) sealed: bool,
    shares: Vec<Vec<u8>>,
    threshold: u64,
}

impl Seal {
    /// Uninitialised, storage "file".
    pub(super) fn uninitialised(ids: &mut Ids) -> Self {
        Self {
            cluster_id: ids.uuid(),
            entered: Vec::new(),
            nonce: String::new(),
            file: true,
            sealed: true,
            shares: Vec::new(),
            threshold: 0,
        }
    }

    /// Initialised with one share, unsealed, in memory.
    pub(super) fn dev(ids: &mut Ids) -> Self {
        Self {
            file: false,
            sealed: false,
            shares: vec![ids.bytes()],
            threshold: 1,
            ..Self::uninitialised(ids)
        }
    }

    /// Answers `sys/init`. The caller must add the root token of the answer to the valid tokens.
    pub(super) fn init(&mut self, request: &Request, ids: &mut Ids) -> Result<Init, Refusal> {
        match request.operation {
            Operation::Read => Ok(Init::Status(json!({ "initialized": self.initialised() }))),
            Operation::Write if self.initialised() => {
                Err(Refusal::bad_request("Vault is already initialized"))
            }
            Operation::Write => {
                let shares = request.body.number("secret_shares").unwrap_or(0);
                let threshold = request.body.number("secret_threshold").unwrap_or(0);
                if !(1..=255).contains(&shares) || !(1..=shares).contains(&threshold) {
                    return Err(Refusal::bad_request(
                        "invalid seal configuration: shares and threshold must be 1 to 255, the threshold \
                         no more than the shares",
                    ));
                }
                self.shares = (0..shares).map(|_| ids.bytes()).collect();
                self.threshold = threshold;
                let root_token = ids.token();
                let answer = json!({
                    "keys": self.shares.iter().map(|share| hex(share)).collect::<Vec<_>>(),
                    "keys_base64": self.shares.iter().map(|share| BASE64.encode(share)).collect::<Vec<_>>(),
                    "root_token": root_token,
                });
                Ok(Init::Done { answer, root_token })
            }
            _ => Err(Refusal::unsupported_operation()),
        }
    }

    /// Answers `sys/unseal`: enters one share, or resets with `reset`.
    pub(super) fn enter(&mut self, request: &Request, ids: &mut Ids) -> Outcome {
        if request.operation != Operation::Write {
            return Err(Refusal::unsupported_operation());
        }
        if !self.initialised() {
            return Err(Refusal::bad_request("server is not yet initialized"));
        }
        if request.body.flag("reset") == Some(true) {
            self.forget_entered();
        } else {
            let share = request
                .body
                .text("key")
                .and_then(decode_share)
                .ok_or_else(|| {
                    Refusal::bad_request("'key' must be a valid hex or base64 string")
                })?;
            if self.sealed {
                self.enter_share(share, ids)?;
            }
        }
        Ok(Answer::Plain(200, self.status()))
    }

    /// The body of `sys/seal-status`.
    pub(super) fn status(&self) -> Value {
        let mut status = json!({
            "type": "shamir",
            "initialized": self.initialised(),
            "sealed": self.sealed,
            "t": self.threshold,
            "n": self.shares.len(),
            "progress": self.entered.len(),
            "nonce": self.nonce,
            "recovery_seal": false,
            "version": VERSION,
            "commit_date": "",
            "migration": false,
            "storage_type": if self.file { "file" } else { "inmem" },
        });
        self.name_cluster(&mut status);
        status
    }

    /// Answers `sys/health`: the status code depends on the state, and the query can set other codes.
    pub(super) fn health(&self, standby: bool, request: &Request) -> Outcome {
        if request.operation != Operation::Read {
            return Err(Refusal::unsupported_operation());
        }
        let standby_ok = request
            .query("standbyok")
            .is_some_and(|value| value != "false");
        let (parameter, default) = if !self.initialised() {
            ("uninitcode", 501)
        } else if self.sealed {
            ("sealedcode", 503)
        } else if standby && !standby_ok {
            ("standbycode", 429)
        } else {
            ("activecode", 200)
        };
        let status = match request.query(parameter) {
            None => default,
            Some(code) => code
                .parse()
                .map_err(|_| Refusal::bad_request(format!("invalid value for {parameter}")))?,
        };
        let replication = if self.sealed { "unknown" } else { "disabled" };
        let mut body = json!({
            "initialized": self.initialised(),
            "sealed": self.sealed,
            "standby": standby || self.sealed,
            "replication_performance_mode": replication,
            "replication_dr_mode": replication,
            "server_time_utc": unix_s(request.now),
            "version": VERSION,
        });
        self.name_cluster(&mut body);
        Ok(Answer::Plain(status, body))
    }

    /// Seals.
    pub(super) fn close(&mut self) {
        self.sealed = true;
        self.forget_entered();
    }

    /// Unseals without shares, if initialised.
    pub(super) fn open(&mut self) {
        self.sealed = !self.initialised();
        self.forget_entered();
    }

    fn initialised(&self) -> bool {
        !self.shares.is_empty()
    }

    fn enter_share(&mut self, share: Vec<u8>, ids: &mut Ids) -> Result<(), Refusal> {
        if self.entered.is_empty() {
            self.nonce = ids.uuid();
        }
        if !self.entered.contains(&share) {
            self.entered.push(share);
        }
        if (self.entered.len() as u64) < self.threshold {
            return Ok(());
        }
        let is_valid = self.entered.iter().all(|share| self.shares.contains(share));
        self.forget_entered();
        if !is_valid {
            return Err(Refusal::bad_request(
                "cipher: message authentication failed",
            ));
        }
        self.sealed = false;
        Ok(())
    }

    fn forget_entered(&mut self) {
        self.entered.clear();
        self.nonce.clear();
    }

    fn name_cluster(&self, body: &mut Value) {
        if let (Some(body), false) = (body.as_object_mut(), self.sealed) {
            body.insert("cluster_name".to_owned(), json!("vault-cluster-simulated"));
            body.insert("cluster_id".to_owned(), json!(self.cluster_id));
        }
    }
}

/// The result of `sys/init`.
pub(super) enum Init {
    Done { answer: Value, root_token: String },
    Status(Value),
}

fn decode_share(text: &str) -> Option<Vec<u8>> {
    let from_hex = || -> Option<Vec<u8>> {
        text.as_bytes()
            .chunks(2)
            .map(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok())
            .collect()
    };
    from_hex()
        .or_else(|| BASE64.decode(text).ok())
        .filter(|share| !share.is_empty())
}
