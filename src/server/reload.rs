//! Rules and certificates change without a restart.
//!
//! The files are read every second and compared by what stands in them, so that a rename, a swapped symlink and a write
//! in place all count. What is new is taken once two looks in a row agree: a file that somebody is still writing is not
//! taken for what it will be. What cannot be used leaves everything as it was, and says so until it is mended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use sha2::{Digest, Sha256};
use tokio::sync::watch;
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::probes::Probes;
use super::tls::Tls;
use crate::audit::Change;
use crate::broker::Broker;
use crate::config::load::{self, Source};
use crate::config::{FileProblems, TlsFiles};
use crate::keyring::Slot;
use crate::keyring::refresh::Refresher;
use crate::policy::Policy;
use crate::toml_file::{Problem, Problems};

/// How long new rules wait for keys that nobody has asked Vault for yet.
const KEYS_WITHIN: Duration = Duration::from_secs(5);

/// Keeps the broker as its files are.
pub(super) struct Reloader {
    pub(super) broker: Arc<Broker>,
    pub(super) refresher: Refresher,
    pub(super) probes: Probes,
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) rules: PathBuf,
    pub(super) tls_files: TlsFiles,
    pub(super) tls: watch::Sender<Arc<Tls>>,
    pub(super) problems: watch::Sender<FileProblems>,
}

/// What stands in a group of files, and what of it has been dealt with.
struct Watched {
    what: &'static str,
    in_force: [u8; 32],
    /// Taken or refused.
    judged: [u8; 32],
    /// Why it was refused, as long as it is: what is taken is not judged again, but what is too early for its time is
    /// good later.
    refused: Option<String>,
    /// What the last look saw.
    seen: [u8; 32],
}

impl Watched {
    fn new(what: &'static str, digest: [u8; 32]) -> Self {
        Self {
            what,
            in_force: digest,
            judged: digest,
            refused: None,
            seen: digest,
        }
    }

    /// Whether two looks in a row saw something that has not been taken.
    fn is_to_be_judged(&mut self, digest: [u8; 32]) -> bool {
        let is_settled = std::mem::replace(&mut self.seen, digest) == digest;
        is_settled && (self.judged != digest || self.refused.is_some())
    }
}

impl Reloader {
    /// Looks every so often until it is dropped. `rules` and `tls` are the files as they were read at the start.
    pub(super) async fn run(mut self, every: Duration, rules: Source, tls: [Source; 3]) {
        let mut rules = Watched::new("rules", rules.digest());
        let mut tls = Watched::new("tls", digest(&tls));
        self.record_start(&rules, &tls);
        loop {
            sleep(every).await;
            // A mount that hangs holds this task up, and nothing else.
            let (rules_file, tls_files) = (self.rules.clone(), self.tls_files.clone());
            let read = move || (Source::read(&rules_file), load::tls_sources(&tls_files));
            let Ok::<_, JoinError>((rules_source, tls_sources)) = spawn_blocking(read).await else {
                continue;
            };
            if rules.is_to_be_judged(rules_source.digest()) {
                let judged = self.take_rules(&rules_source).await;
                self.settle(&mut rules, judged);
            }
            if tls.is_to_be_judged(digest(&tls_sources)) {
                let judged = self.take_certificates(&tls_sources);
                self.settle(&mut tls, judged);
            }
        }
    }

    /// The record begins with what is in force.
    fn record_start(&self, rules: &Watched, tls: &Watched) {
        for watched in [rules, tls] {
            self.broker.audit.changed(&Change {
                what: watched.what,
                before: None,
                after: &watched.in_force,
                outcome: "in_force",
                detail: None,
            });
        }
    }

    /// New keys first, so that no call fails for a key that is only on its way; then the rules; then what they no longer
    /// name goes.
    async fn take_rules(&mut self, source: &Source) -> Result<(), Vec<Problem>> {
        let policy = Arc::new(load::rules(source)?);
        self.broker.keyring.add(policy.accounts());
        self.refresher.follow();
        self.probes.follow(&self.broker, &policy);
        let _ = timeout(KEYS_WITHIN, keys_of(&self.broker, &policy)).await;
        self.broker.set_policy(Arc::clone(&policy));
        self.broker.keyring.retain(policy.accounts());
        self.refresher.follow();
        Ok(())
    }

    /// Connections from now on shake hands by them; those of CAs that are gone end.
    fn take_certificates(&mut self, sources: &[Source; 3]) -> Result<(), Vec<Problem>> {
        let now_ms = self.broker.clock.wall_ms();
        let problems = Problems::default();
        let certificates = load::certificates(sources, now_ms, &problems);
        problems.into_result()?;
        // What is missing has been reported as a problem.
        let certificates = certificates.ok_or_else(Vec::new)?;
        let not_after_ms = certificates.not_after_ms;
        let generation = self.tls.borrow().generation + 1;
        let tls = Tls::new(
            certificates,
            generation,
            &self.provider,
            &self.broker.metrics,
        );
        let tls =
            tls.map_err(|error| vec![Problem::new("tls", crate::telemetry::chain(&error))])?;
        self.broker.metrics.certificate_ends(not_after_ms);
        self.tls.send_replace(Arc::new(tls));
        Ok(())
    }

    /// Records and reports what became of a change.
    fn settle(&self, watched: &mut Watched, judged: Result<(), Vec<Problem>>) {
        let (what, before, after) = (watched.what, watched.in_force, watched.seen);
        let detail = judged.as_ref().err().map(|problems| sentence(problems));
        if watched.judged == after && judged.is_err() && watched.refused == detail {
            // As it was told before.
            return;
        }
        watched.judged = after;
        watched.refused.clone_from(&detail);
        let outcome = match &judged {
            Ok(()) => {
                watched.in_force = after;
                tracing::info!(what, "changed file is in force");
                "taken"
            }
            Err(_) => {
                tracing::error!(
                    what,
                    problems = detail,
                    "changed file cannot be used; what was in force stays"
                );
                "refused"
            }
        };
        self.broker.metrics.reloaded(what, outcome, judged.is_err());
        self.broker.audit.changed(&Change {
            what,
            before: Some(&before),
            after: &after,
            outcome,
            detail,
        });
        self.problems.send_modify(|all| match judged {
            Ok(()) => _ = all.remove(what),
            Err(problems) => _ = all.insert(what, problems),
        });
    }
}

fn digest(sources: &[Source]) -> [u8; 32] {
    let all = sources.iter().map(Source::digest).collect::<Vec<_>>();
    Sha256::digest(all.concat()).into()
}

fn sentence(problems: &[Problem]) -> String {
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    problems.join("; ")
}

/// Waits until Vault has said something about every key that these rules name.
async fn keys_of(broker: &Broker, policy: &Policy) {
    let mut changes = broker.keyring.changes();
    let is_named = |account, name| {
        policy
            .accounts()
            .any(|named| named.id == account && named.keys.values().any(|key| *key == name))
    };
    loop {
        let mut keys = broker.keyring.status().into_iter();
        let waits =
            keys.any(|key| matches!(key.slot, Slot::Waiting(_)) && is_named(key.account, key.name));
        // An error means that the keyring is gone.
        if !waits || changes.changed().await.is_err() {
            return;
        }
    }
}
