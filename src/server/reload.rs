//! Reloads rules and certificates without a restart.
//!
//! The files are read every second and compared by content, so that a rename, a swapped symlink and a write in place are
//! all noticed. New content is loaded once two reads in a row agree, so that a half-written file is not loaded. If it
//! cannot be used, the previous content stays in use, and the problem is reported until the file is fixed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use tokio::sync::watch;
use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tokio::time::{sleep, timeout};

use super::StartError;
use super::probes::Probes;
use super::tls::Tls;
use crate::audit::Change;
use crate::base::ids::{AdminId, BotId};
use crate::base::toml_file::{Problem, Problems};
use crate::broker::Broker;
use crate::config::load::{self, Source, TlsSources};
use crate::config::permissions::{self, NamedFile};
use crate::config::{FileProblems, TlsFiles};
use crate::keyring::refresh::Refresher;
use crate::keyring::{KeySnapshot, KeyState};
use crate::policy::Policy;

/// How long new rules wait for keys and clocks of hosts that the old rules did not name.
const READY_WITHIN: Duration = Duration::from_secs(5);

/// How often to check whether a host's time has been measured.
const CHECK_EVERY: Duration = Duration::from_millis(20);

/// Keeps the broker in sync with its files.
pub(super) struct Reloader {
    pub(super) broker: Arc<Broker>,
    pub(super) refresher: Refresher,
    pub(super) probes: Probes,
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) rules: PathBuf,
    pub(super) tls_files: TlsFiles,
    /// TLS of the bot listener.
    pub(super) tls: watch::Sender<Arc<Tls>>,
    pub(super) admins_tls: watch::Sender<Arc<Tls>>,
    pub(super) problems: watch::Sender<FileProblems>,
    /// SHA-256 of the CAs in use for bots and admins.
    pub(super) cas: [u8; 32],
    /// All files whose permissions are checked.
    pub(super) files: Arc<[NamedFile]>,
    /// Warnings about the CAs in use, each with its setting.
    pub(super) ca_warnings: Vec<Problem>,
}

/// A check that may hang on a mount, in a separate thread. The reload loop never waits for its result.
struct BackgroundCheck<T>(Option<JoinHandle<T>>);

impl<T> Default for BackgroundCheck<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> BackgroundCheck<T> {
    /// Returns the result of a check that has ended since the last poll. Starts the next one unless one is running.
    async fn poll(&mut self, check: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let found = match self.0.take_if(|running| running.is_finished()) {
            // An error means that it panicked; the next one may succeed.
            Some(ended) => ended.await.ok(),
            None => None,
        };
        self.0.get_or_insert_with(|| spawn_blocking(check));
        found
    }
}

/// The contents of a group of files, as SHA-256.
struct Watched {
    file: &'static str,
    in_force: [u8; 32],
    /// The last contents that were loaded or refused.
    judged: [u8; 32],
    /// Why the current contents were refused. Refused contents are tried again: a certificate that is not valid yet will be
    /// later.
    refused: Option<String>,
    /// The contents at the last read.
    seen: [u8; 32],
}

impl Watched {
    fn new(file: &'static str, digest: [u8; 32]) -> Self {
        Self {
            file,
            in_force: digest,
            judged: digest,
            refused: None,
            seen: digest,
        }
    }

    /// Whether two reads in a row agree on contents that are not loaded.
    fn observe(&mut self, digest: [u8; 32]) -> bool {
        let is_settled = std::mem::replace(&mut self.seen, digest) == digest;
        is_settled && (self.judged != digest || self.refused.is_some())
    }
}

impl Reloader {
    /// Checks the files every `every` until dropped. `rules` and `tls` are the files as read at the start.
    pub(super) async fn run(mut self, every: Duration, rules: Source, tls: TlsSources) {
        let mut rules = Watched::new("rules", rules.digest());
        let mut tls = Watched::new("tls", tls.digest());
        self.record_start(&rules, &tls);
        let mut permission_check = BackgroundCheck::default();
        let mut open = Vec::new();
        loop {
            let files = Arc::clone(&self.files);
            let check = move || permissions::warnings(&files);
            open = permission_check.poll(check).await.unwrap_or(open);
            self.warn(&open);
            sleep(every).await;
            // Also restarts tasks that have panicked.
            self.follow();
            // A mount that hangs blocks only this task.
            let (rules_file, tls_files) = (self.rules.clone(), self.tls_files.clone());
            let read = move || (Source::read(&rules_file), TlsSources::read(&tls_files));
            let read = spawn_blocking(read).await;
            let Ok::<_, JoinError>((rules_source, tls_sources)) = read else {
                continue;
            };
            if rules_source.is_unseen() || tls_sources.is_unseen() {
                continue;
            }
            if rules.observe(rules_source.digest()) {
                let judged = self.load_rules(&rules_source).await;
                self.settle(&mut rules, judged);
            }
            if tls.observe(tls_sources.digest()) {
                let judged = self.load_certificates(&tls_sources);
                self.settle(&mut tls, judged);
            }
        }
    }

    /// Polls the keys and probes the hosts of the rules in use, and no others.
    fn follow(&mut self) {
        self.refresher.follow();
        self.probes.follow(&self.broker, &self.broker.policy());
    }

    /// Updates the warnings about files in use; `open` are those about permissions. Logs each new one.
    fn warn(&self, open: &[Problem]) {
        let mut warnings = self.ca_warnings.clone();
        warnings.extend_from_slice(open);
        let known = self.problems.borrow().warnings.clone();
        if warnings == known {
            return;
        }
        for warning in warnings.iter().filter(|warning| !known.contains(warning)) {
            tracing::warn!(
                setting = warning.key,
                problem = warning.problem,
                "file warning"
            );
        }
        self.problems.send_modify(|all| all.warnings = warnings);
    }

    /// Audits the files that are in use at the start.
    fn record_start(&self, rules: &Watched, tls: &Watched) {
        for watched in [rules, tls] {
            let change = Change {
                file: watched.file,
                before: None,
                after: &watched.in_force,
                outcome: "loaded",
                detail: None,
            };
            drop(self.broker.audit.changed(&change));
        }
    }

    /// Loads new rules: first reads new keys, so that no call fails for a key that is still loading; then switches the rules;
    /// then removes keys that they no longer name. A call that is waiting for a connection checks the rules again.
    async fn load_rules(&mut self, source: &Source) -> Result<(), Vec<Problem>> {
        let policy = Arc::new(load::rules(source)?);
        let old = self.broker.policy();
        if policy.counts().1 == 0 && old.counts().1 > 0 {
            let problem = "has no grants, but the rules in use have some; check that the file is not truncated (to lock out all bots, stop the broker instead)";
            return Err(vec![Problem::new("rules", problem)]);
        }
        let known: Vec<_> = self.broker.keyring.entries();
        let is_new = |key: &KeySnapshot| {
            !known
                .iter()
                .any(|known| known.account == key.account && known.name == key.name)
        };
        self.broker.keyring.add(policy.accounts());
        self.refresher.follow();
        self.probes.follow(&self.broker, &policy);
        let _ = timeout(READY_WITHIN, ready_for(&self.broker, &policy, is_new)).await;
        self.broker.set_policy(Arc::clone(&policy));
        self.broker.keyring.retain(policy.accounts());
        self.follow();
        Ok(())
    }

    /// Loads new certificates: new connections use them; connections whose CA was removed are closed.
    fn load_certificates(&mut self, sources: &TlsSources) -> Result<(), Vec<Problem>> {
        let now_ms = self.broker.clock.wall_ms();
        let problems = Problems::default();
        let certificates = load::certificates(sources, now_ms, &problems);
        let warnings = problems.take_warnings();
        problems.into_result()?;
        // `None` has been reported as a problem.
        let certificates = certificates.ok_or_else(Vec::new)?;
        let not_after_ms = certificates.not_after_ms;
        // Open connections are verified again only if the CAs have changed.
        let cas = sources.cas_digest();
        let generation = self.tls.borrow().generation + u64::from(self.cas != cas);
        let (provider, metrics) = (&self.provider, &self.broker.metrics);
        let (bots_ca, admins_ca) = (&certificates.client_ca, &certificates.admin_ca);
        let unusable =
            |error: StartError| vec![Problem::new("tls", crate::telemetry::chain(&error))];
        let bots = Tls::new::<BotId>(&certificates, bots_ca, generation, provider, metrics);
        let bots = bots.map_err(unusable)?;
        let admins = Tls::new::<AdminId>(&certificates, admins_ca, generation, provider, metrics);
        let admins = admins.map_err(unusable)?;
        self.cas = cas;
        // Warnings about the roots of Vault and the exchange stay: those files are read only at the start.
        self.ca_warnings
            .retain(|warning| !warning.key.starts_with("tls."));
        self.ca_warnings.extend(warnings);
        metrics.certificate_not_after.set(not_after_ms / 1000);
        self.tls.send_replace(Arc::new(bots));
        self.admins_tls.send_replace(Arc::new(admins));
        Ok(())
    }

    /// Audits and reports the result of a change.
    fn settle(&self, watched: &mut Watched, judged: Result<(), Vec<Problem>>) {
        let (file, before, after) = (watched.file, watched.in_force, watched.seen);
        let detail = judged.as_ref().err().map(|problems| sentence(problems));
        let previous_refusal = std::mem::replace(&mut watched.refused, detail.clone());
        let is_reported = std::mem::replace(&mut watched.judged, after) == after
            && detail.is_some()
            && previous_refusal == detail;
        self.problems.send_modify(|all| match judged {
            Ok(()) => _ = all.rejected.remove(file),
            Err(problems) => _ = all.rejected.insert(file, problems),
        });
        if is_reported {
            return;
        }
        let outcome = if detail.is_none() {
            watched.in_force = after;
            tracing::info!(file, "changed file loaded");
            "reloaded"
        } else {
            tracing::error!(
                file,
                problems = detail,
                "reload failed; still using the previously loaded version"
            );
            "rejected"
        };
        let labels = [("file", file), ("outcome", outcome)];
        self.broker.metrics.reloads.get_or_create(&labels).inc();
        let change = Change {
            file,
            before: Some(&before),
            after: &after,
            outcome,
            detail,
        };
        drop(self.broker.audit.changed(&change));
    }
}

fn sentence(problems: &[Problem]) -> String {
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    problems.join("; ")
}

/// Waits until every new key was read or failed, and the time of every new host of these rules is known.
async fn ready_for(broker: &Broker, policy: &Policy, is_new: impl Fn(&KeySnapshot) -> bool) {
    let is_waiting = |key: &KeySnapshot| matches!(key.state, KeyState::Pending(_)) && is_new(key);
    let mut changes = broker.keyring.changes();
    while broker.keyring.entries().iter().any(is_waiting) {
        // An error means that the keyring was dropped.
        if changes.changed().await.is_err() {
            return;
        }
    }
    let known_before = broker.policy().hosts();
    for host_id in policy.hosts().difference(&known_before) {
        while broker.clock.check(*host_id).is_err() {
            sleep(CHECK_EVERY).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;

    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn hanging_background_check_is_not_waited_for_and_not_started_twice() {
        let starts = Arc::new(AtomicU32::new(0));
        let (release, released) = mpsc::channel();
        let mut check = BackgroundCheck::default();
        let started = Arc::clone(&starts);
        let hanging = move || {
            started.fetch_add(1, Ordering::Relaxed);
            released.recv().unwrap()
        };
        assert_eq!(check.poll(hanging).now_or_never(), Some(None));
        for _ in 0..3 {
            let started = Arc::clone(&starts);
            let another = move || started.fetch_add(1, Ordering::Relaxed);
            assert_eq!(check.poll(another).now_or_never(), Some(None));
        }
        release.send(7).unwrap();
        let found = loop {
            if let Some(found) = check.poll(|| 8).await {
                break found;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!((found, starts.load(Ordering::Relaxed)), (7, 1));
    }

    #[tokio::test]
    async fn background_check_that_panics_is_started_again() {
        let mut check = BackgroundCheck::default();
        assert_eq!(check.poll(|| panic!("a defect")).await, None);
        let found = loop {
            if let Some(found) = check.poll(|| 8).await {
                break found;
            }
            tokio::task::yield_now().await;
        };
        assert_eq!(found, 8);
    }
}
