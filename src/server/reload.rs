//! Rules and certificates change without a restart.
//!
//! The files are read every second and compared by what stands in them, so that a rename, a swapped symlink and a write
//! in place all count. What is new is taken once two looks in a row agree: a file that somebody is still writing is not
//! taken for what it will be. What cannot be used leaves everything as it was, and says so until it is mended.

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

/// How long new rules wait for what they name for the first time: keys in Vault, the time at a host.
const READY_WITHIN: Duration = Duration::from_secs(5);

/// How often it is looked whether a host has told its time.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Keeps the broker as its files are.
pub(super) struct Reloader {
    pub(super) broker: Arc<Broker>,
    pub(super) refresher: Refresher,
    pub(super) probes: Probes,
    pub(super) provider: Arc<CryptoProvider>,
    pub(super) rules: PathBuf,
    pub(super) tls_files: TlsFiles,
    /// The bots'.
    pub(super) tls: watch::Sender<Arc<Tls>>,
    pub(super) admins_tls: watch::Sender<Arc<Tls>>,
    pub(super) problems: watch::Sender<FileProblems>,
    /// SHA-256 of the CAs of bots and admins in force.
    pub(super) cas: [u8; 32],
    /// All files whose permissions are checked.
    pub(super) files: Arc<[NamedFile]>,
    /// What to warn of in the CAs in force, each under its setting.
    pub(super) ca_warnings: Vec<Problem>,
}

/// A check that may hang on a mount, in a thread of its own. Its result is taken once it is there, and never waited for.
struct BackgroundCheck<T>(Option<JoinHandle<T>>);

impl<T> Default for BackgroundCheck<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: Send + 'static> BackgroundCheck<T> {
    /// The result of the check that has ended since the last poll, if one has. Starts the next one unless one is running.
    async fn poll(&mut self, check: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let found = match self.0.take_if(|running| running.is_finished()) {
            // An error means that it panicked: the next one may not.
            Some(ended) => ended.await.ok(),
            None => None,
        };
        self.0.get_or_insert_with(|| spawn_blocking(check));
        found
    }
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
    fn observe(&mut self, digest: [u8; 32]) -> bool {
        let is_settled = std::mem::replace(&mut self.seen, digest) == digest;
        is_settled && (self.judged != digest || self.refused.is_some())
    }
}

impl Reloader {
    /// Looks every so often until it is dropped. `rules` and `tls` are the files as they were read at the start.
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
            // Also starts again what a defect has ended.
            self.follow();
            // A mount that hangs holds this task up, and nothing else.
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
                let judged = self.take_rules(&rules_source).await;
                self.settle(&mut rules, judged);
            }
            if tls.observe(tls_sources.digest()) {
                let judged = self.take_certificates(&tls_sources);
                self.settle(&mut tls, judged);
            }
        }
    }

    /// Asks Vault for the keys, and the exchange for the time, that the rules in force name, and for no others.
    fn follow(&mut self) {
        self.refresher.follow();
        self.probes.follow(&self.broker, &self.broker.policy());
    }

    /// Keeps the warnings about files in use; `open` are those about permissions. Logs each one that is new.
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
    /// name goes. A call that is still waiting for a connection asks the rules once more.
    async fn take_rules(&mut self, source: &Source) -> Result<(), Vec<Problem>> {
        let policy = Arc::new(load::rules(source)?);
        let old = self.broker.policy();
        if policy.counts().1 == 0 && old.counts().1 > 0 {
            let problem = "holds no grant at all; a file that was cut short looks like this. To lock every bot out, stop the broker";
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

    /// Connections from now on shake hands by them; those of CAs that are gone end.
    fn take_certificates(&mut self, sources: &TlsSources) -> Result<(), Vec<Problem>> {
        let now_ms = self.broker.clock.wall_ms();
        let problems = Problems::default();
        let certificates = load::certificates(sources, now_ms, &problems);
        let warnings = problems.take_warnings();
        problems.into_result()?;
        // What is missing has been reported as a problem.
        let certificates = certificates.ok_or_else(Vec::new)?;
        let not_after_ms = certificates.not_after_ms;
        // Connections are checked again only where other CAs may have issued their certificates.
        let cas = sources.cas_digest();
        let generation = self.tls.borrow().generation + u64::from(self.cas != cas);
        let (provider, metrics) = (&self.provider, &self.broker.metrics);
        let (bots_ca, admins_ca) = (&certificates.client_ca, &certificates.admin_ca);
        let unfit = |error: StartError| vec![Problem::new("tls", crate::telemetry::chain(&error))];
        let bots = Tls::new::<BotId>(&certificates, bots_ca, generation, provider, metrics);
        let bots = bots.map_err(unfit)?;
        let admins = Tls::new::<AdminId>(&certificates, admins_ca, generation, provider, metrics);
        let admins = admins.map_err(unfit)?;
        self.cas = cas;
        // Those of the roots of Vault and exchange stay: their files are read at the start alone.
        self.ca_warnings
            .retain(|warning| !warning.key.starts_with("tls."));
        self.ca_warnings.extend(warnings);
        metrics.certificate_ends.set(not_after_ms / 1000);
        self.tls.send_replace(Arc::new(bots));
        self.admins_tls.send_replace(Arc::new(admins));
        Ok(())
    }

    /// Records and reports what became of a change.
    fn settle(&self, watched: &mut Watched, judged: Result<(), Vec<Problem>>) {
        let (what, before, after) = (watched.what, watched.in_force, watched.seen);
        let detail = judged.as_ref().err().map(|problems| sentence(problems));
        let refused_before = std::mem::replace(&mut watched.refused, detail.clone());
        let is_old_news = std::mem::replace(&mut watched.judged, after) == after
            && detail.is_some()
            && refused_before == detail;
        self.problems.send_modify(|all| match judged {
            Ok(()) => _ = all.rejected.remove(what),
            Err(problems) => _ = all.rejected.insert(what, problems),
        });
        if is_old_news {
            return;
        }
        let outcome = if detail.is_none() {
            watched.in_force = after;
            tracing::info!(what, "changed file loaded");
            "taken"
        } else {
            tracing::error!(
                what,
                problems = detail,
                "reload failed; keeping previous file"
            );
            "refused"
        };
        let labels = [("file", what), ("outcome", outcome)];
        self.broker.metrics.reloads.get_or_create(&labels).inc();
        self.broker.audit.changed(&Change {
            what,
            before: Some(&before),
            after: &after,
            outcome,
            detail,
        });
    }
}

fn sentence(problems: &[Problem]) -> String {
    let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
    problems.join("; ")
}

/// Waits until Vault has said something about every key that is new, and every host of these rules its time.
async fn ready_for(broker: &Broker, policy: &Policy, is_new: impl Fn(&KeySnapshot) -> bool) {
    let is_waiting = |key: &KeySnapshot| matches!(key.state, KeyState::Pending(_)) && is_new(key);
    let mut changes = broker.keyring.changes();
    while broker.keyring.entries().iter().any(is_waiting) {
        // An error means that the keyring is gone.
        if changes.changed().await.is_err() {
            return;
        }
    }
    let known_before = broker.policy().hosts();
    for place in policy.hosts().difference(&known_before) {
        while broker.clock.check(*place).is_err() {
            sleep(LOOK_EVERY).await;
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
    async fn background_check_that_hangs_is_never_waited_for_nor_started_twice() {
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
