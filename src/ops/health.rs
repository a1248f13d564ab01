//! How the broker is, at this moment: whether it is ready, what is wrong, and its state as gauges.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue};
use prometheus_client::metrics::MetricType;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::key_health::{self, KeyHealth};
use crate::base::diagnosis::{Diagnosis, Severity};
use crate::broker::Broker;
use crate::clock::{self, ClockUncertain, ExchangeTime, HostId};
use crate::config::FileProblems;
use crate::egress::proof::ProofStatus;
use crate::process::hardened;
use crate::proto::KeyStatus;

/// Whether the broker can do its work, and what is wrong.
#[derive(Debug)]
pub struct Readiness {
    /// Whether bots should be sent here.
    pub is_ready: bool,
    /// What is wrong, also where the broker is ready all the same.
    pub(crate) problems: Vec<Diagnosis>,
}

/// Asks `broker` how it is.
///
/// Not ready while it stops, while Vault has not said a word about a key, while no key at all is in memory and fresh
/// enough, while a host of the exchange has no address or no known time, and while requests do not provably leave from
/// the expected address. A key that Vault refuses is a problem, but does not take the others down.
pub(crate) fn readiness(broker: &Broker) -> Readiness {
    of_keys(broker, &key_health::all(broker))
}

fn of_keys(broker: &Broker, keys: &[KeyHealth]) -> Readiness {
    let mut problems = Vec::new();
    if broker.is_draining() {
        problems.push(Diagnosis::failed("broker", "shutting down", ""));
    }
    let is_any_available = keys.iter().any(|key| key.is_available);
    for key in keys {
        problems.extend(key.troubles.iter().cloned().map(|mut trouble| {
            if !is_any_available {
                trouble.severity = Severity::Failed;
            }
            trouble.about(name_of(key))
        }));
    }
    if let Some(failure) = broker.audit.failure() {
        let cause = format!("{failure}; risk-increasing requests are refused");
        problems.push(Diagnosis::failed("audit", cause, ""));
    }
    if broker.metrics.certificate_ends.get() < broker.clock.wall_ms() / 1000 {
        let fix = "put a new one in its place";
        problems.push(Diagnosis::failed(
            "certificate",
            "the server certificate has ended",
            fix,
        ));
    }
    let missing = broker.egress.without_address(&broker.policy().hosts());
    let missing = missing.into_iter();
    problems.extend(missing.map(|host| Diagnosis::failed("exchange", host.to_string(), "")));
    let ProofStatus {
        mismatch,
        is_strict,
        failure,
        ..
    } = broker.proof.status();
    if let Some(mismatch) = mismatch {
        let failure = failure.map(|failure| format!(" (last question: {failure})"));
        let cause = format!("{mismatch}{}", failure.unwrap_or_default());
        let mut problem = Diagnosis::failed("egress", cause, "");
        if !is_strict {
            problem.severity = Severity::Warning;
        }
        problems.push(problem);
    }
    for (site, host) in broker.policy().hosts() {
        if let Err(uncertain) = broker.clock.check((site, host)) {
            let place = format!("{site}/{}", host.as_str());
            let fix = match uncertain {
                ClockUncertain::Different(_) => {
                    format!("set the clock that is wrong, or run `credbroker clock accept {place}`")
                }
                ClockUncertain::Never | ClockUncertain::Stale(..) => String::new(),
            };
            problems.push(Diagnosis::failed("clock", uncertain.to_string(), fix).about(place));
        }
    }
    Readiness {
        is_ready: !problems.iter().any(Diagnosis::is_failed),
        problems,
    }
}

fn name_of(key: &KeyHealth) -> String {
    format!("{}/{}", key.account, key.name)
}

/// What is in force, beside what is wrong: for `/readyz?verbose`.
pub(crate) fn details(broker: &Broker, problems: &FileProblems) -> Vec<String> {
    let mut lines = Vec::new();
    let keys = key_health::all(broker);
    for key in &keys {
        if let Some(version) = key.version {
            // Otherwise it has been told as what is wrong.
            let age = key.age.filter(|_| key.is_confirmed);
            let confirmed = age.map(|age| format!(", confirmed by Vault {} s ago", age.as_secs()));
            let confirmed = confirmed.unwrap_or_default();
            let name = name_of(key);
            lines.push(format!("key {name}: version {version} loaded{confirmed}"));
        }
    }
    for key in &keys {
        let name = name_of(key);
        lines.push(format!("key {name}: {}", key.status.word()));
        // The troubles have been told as what is wrong.
        let findings = key.findings.iter();
        lines.extend(findings.map(|finding| format!("key {name}: {}", finding.text())));
    }
    for (bot, mark) in broker.restrictions.blocked_bots() {
        lines.push(format!("bot {bot}: blocked by {}", mark.by));
    }
    let ProofStatus {
        seen,
        failure,
        refused,
        ..
    } = broker.proof.status();
    let now = broker.clock.boot();
    if let Some((address, at)) = seen {
        let age_s = now.saturating_sub(at).as_secs();
        lines.push(format!("egress: the exchange saw {address} {age_s} s ago"));
    }
    lines.extend(
        failure.map(|failure| format!("egress: the last question got no answer: {failure}")),
    );
    if let Some((address, at)) = refused {
        let address =
            address.map_or_else(|| "our address".to_owned(), |address| address.to_string());
        let age_s = now.saturating_sub(at).as_secs();
        lines.push(format!(
            "egress: the exchange refused {address} for a key {age_s} s ago (400006): is it on the key's whitelist?"
        ));
    }
    for place in broker.policy().hosts() {
        let time = broker.clock.exchange(place);
        if let (Some(uncertainty), Some(age)) = (time.uncertainty, time.age) {
            lines.push(format!(
                "clock {}/{}: {} ms from the system's, to within {} ms, measured {} s ago",
                place.0,
                place.1.as_str(),
                time.ms - broker.clock.wall_ms(),
                uncertainty.as_millis(),
                age.as_secs()
            ));
        }
    }
    for (site, host) in broker.policy().hosts() {
        if let Some(accepted) = broker.clock.accepted((site, host)) {
            lines.push(format!(
                "clock {site}/{}: {} accepted a difference until the broker restarts: {}",
                host.as_str(),
                accepted.by,
                clock::difference(accepted.ms)
            ));
        }
    }
    let (connections, calls) = broker.admission.now();
    lines.push(format!(
        "{connections} connection(s), {calls} call(s) in flight"
    ));
    for (what, problems) in &problems.rejected {
        for problem in problems {
            lines.push(format!("{what}: a changed file is not in force: {problem}"));
        }
    }
    let warnings = problems.warnings.iter();
    lines.extend(warnings.map(|warning| format!("warning: {warning}")));
    lines
}

/// The broker's state as gauges, read at each scrape.
#[derive(Debug)]
pub(crate) struct HealthMetrics {
    pub(crate) broker: Arc<Broker>,
    pub(crate) problems: watch::Receiver<FileProblems>,
}

impl Collector for HealthMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (broker, gauges) = (&*self.broker, &mut encoder);
        let keys = key_health::all(broker);
        let is_ready = of_keys(broker, &keys).is_ready;
        let help =
            "1 while /readyz answers ready; some keys may still be unavailable: see key_available";
        gauge(gauges, "ready", help, [([], i64::from(is_ready))])?;
        encode_keys(&keys, gauges)?;
        encode_clock(broker, gauges)?;
        encode_egress(broker, gauges)?;
        encode_files(&self.problems.borrow(), gauges)?;
        encode_process(broker, gauges)
    }
}

/// Encodes a gauge with its `values` and their labels. `help` gets a full stop, as the registry does with its own.
fn gauge<const N: usize, V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = ([(&'static str, String); N], V)>,
) -> fmt::Result {
    let help = format!("{help}.");
    let mut gauge = encoder.encode_descriptor(name, &help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        // A family without labels would be encoded with empty braces.
        if N == 0 {
            gauge.encode_gauge(&value)?;
        } else {
            gauge.encode_family(&labels)?.encode_gauge(&value)?;
        }
    }
    Ok(())
}

fn encode_keys(keys: &[KeyHealth], gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let keys = || {
        keys.iter().map(|key| {
            let (account, name) = (key.account.to_string(), key.name.to_string());
            ([("account", account), ("key", name)], key)
        })
    };
    let help = "1 while the key is loaded and fresh enough for every request";
    let values = keys().map(|(labels, key)| (labels, i64::from(key.is_available)));
    gauge(gauges, "key_available", help, values)?;
    let help = "Seconds since Vault last confirmed the key; absent while it is not loaded";
    let values = keys().filter_map(|(labels, key)| Some((labels, key.age?.as_secs_f64())));
    gauge(gauges, "key_age_seconds", help, values)?;
    let help = "Version in Vault of the loaded key";
    let values = keys().filter_map(|(labels, key)| Some((labels, key.version?)));
    gauge(gauges, "key_version", help, values)?;
    let help = "1 for the key's current status, 0 for the others";
    let values = keys().flat_map(|([account, name], key)| {
        KeyStatus::ALL.map(|status| {
            let word = ("status", status.word().to_owned());
            let labels = [account.clone(), name.clone(), word];
            (labels, i64::from(key.status == status))
        })
    });
    gauge(gauges, "key_status", help, values)?;
    let help = "When the exchange last took a request that the key signed, Unix time";
    let values = keys().filter_map(|(labels, key)| Some((labels, seconds(key.used_ms?))));
    gauge(gauges, "key_used_timestamp_seconds", help, values)?;
    let help = "When the key was last tested, Unix time";
    let values = keys().filter_map(|(labels, key)| Some((labels, seconds(key.tested_ms?))));
    gauge(gauges, "key_tested_timestamp_seconds", help, values)?;
    let help = "When the key expires, Unix time; absent if it does not";
    let ends = |key: &KeyHealth| Some(seconds(key.info.as_ref()?.expires_at_ms?));
    let values = keys().filter_map(|(labels, key)| Some((labels, ends(key)?)));
    gauge(gauges, "key_not_after_timestamp_seconds", help, values)
}

fn encode_clock(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let wall_ms = broker.clock.wall_ms();
    let places = broker.policy().hosts();
    let label = |(site, host): HostId| {
        let host = host.as_str().to_owned();
        [("site", site.to_string()), ("host", host)]
    };
    let places = || places.iter().map(|&place| (label(place), place));
    let times = || places().map(|(labels, place)| (labels, broker.clock.exchange(place)));
    let help = "The exchange's time less the system's";
    let offset = |time: ExchangeTime| time.age.map(|_| seconds(time.ms - wall_ms));
    let values = times().filter_map(|(labels, time)| Some((labels, offset(time)?)));
    gauge(gauges, "clock_offset_seconds", help, values)?;
    let help =
        "How far the exchange's time may be off; past 2 risk-increasing requests are refused";
    let values =
        times().filter_map(|(labels, time)| Some((labels, time.uncertainty?.as_secs_f64())));
    gauge(gauges, "clock_uncertainty_seconds", help, values)?;
    let help = "Since the exchange's time was measured";
    let values = times().filter_map(|(labels, time)| Some((labels, time.age?.as_secs_f64())));
    gauge(gauges, "clock_age_seconds", help, values)?;
    let help = "1 while the exchange's time is more than a day from the system's and no admin has accepted that";
    let is_refused = |place| broker.clock.refused_difference(place).is_some();
    let values = places().map(|(labels, place)| (labels, i64::from(is_refused(place))));
    gauge(gauges, "clock_difference_refused", help, values)
}

fn encode_egress(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let proof = broker.proof.status();
    let help = "1 while requests do not provably leave from the expected address";
    let value = i64::from(proof.mismatch.is_some());
    gauge(gauges, "egress_mismatch", help, [([], value)])?;
    let help = "Since the exchange last said from which address requests come";
    let age = |at| broker.clock.boot().saturating_sub(at).as_secs_f64();
    let value = proof.seen.map(|(_, at)| ([], age(at)));
    gauge(gauges, "egress_proof_age_seconds", help, value)?;
    let help = "1 while the last egress IP check has no answer";
    let value = i64::from(proof.failure.is_some());
    gauge(gauges, "egress_check_failed", help, [([], value)])
}

fn encode_files(problems: &FileProblems, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let help = "1 while a changed file cannot be used and the previous one is in force";
    let values = ["rules", "tls"].map(|file| {
        let is_unusable = problems.rejected.contains_key(file);
        ([("file", file.to_owned())], i64::from(is_unusable))
    });
    gauge(gauges, "file_unusable", help, values)?;
    let help = "Files in use whose permissions are too open, CAs whose name constraints cannot be evaluated, and ignored \
                certificates among the roots of servers; /readyz?verbose names them";
    let number = problems.warnings.len();
    gauge(gauges, "file_warnings", help, [([], number)])
}

fn encode_process(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let process = hardened();
    let help = "1 while memory cannot be swapped out";
    let value = process.map(|process| ([], i64::from(process.is_locked)));
    gauge(gauges, "memory_locked", help, value)?;
    let help = "1 while nobody but root can read the process's memory";
    let value = process.map(|process| ([], i64::from(process.is_undumpable)));
    gauge(gauges, "undumpable", help, value)?;
    let help = "Files and connections that the process may have open";
    let value = process.map(|process| ([], process.descriptors));
    gauge(gauges, "descriptors_limit", help, value)?;
    let help = "When the process started, Unix time";
    let value = process.map(|process| ([], process.started_s));
    gauge(gauges, "start_time_seconds", help, value)?;
    let help = "1 while the audit log is writable";
    let value = i64::from(broker.audit.failure().is_none());
    gauge(gauges, "audit_writable", help, [([], value)])?;
    let help = "Running tasks of the runtime";
    let runtime = Handle::try_current().ok();
    let tasks = runtime.map(|runtime| ([], runtime.metrics().num_alive_tasks()));
    gauge(gauges, "tasks", help, tasks)?;
    let (connections, calls) = broker.admission.now();
    let help = "Open connections of bots";
    gauge(gauges, "connections", help, [([], connections)])?;
    let help = "Calls of bots in flight";
    gauge(gauges, "calls_in_flight", help, [([], calls)])
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 milliseconds")]
fn seconds(ms: i64) -> f64 {
    ms as f64 / 1000.0
}
