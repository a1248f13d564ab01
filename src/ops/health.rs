//! The broker's current readiness, its problems, and its state as gauges.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeGaugeValue};
use prometheus_client::metrics::MetricType;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::key_health::{self, KeyHealth};
use crate::audit::Audit;
use crate::base::diagnosis::{Diagnosis, Severity};
use crate::broker::Broker;
use crate::budgets::UsedPool;
use crate::clock::{self, ClockUncertain, ExchangeTime, HostId};
use crate::config::FileProblems;
use crate::egress::proof::ProofStatus;
use crate::kucoin::advice;
use crate::orders::ClaimsUnknown;
use crate::process::hardened;
use crate::proto::KeyStatus;

/// In the lines of [`details`] about a changed file that was rejected, after the kind of file.
pub(crate) const RELOAD_FAILED: &str =
    ": reload failed; still using the previously loaded version.";

/// Whether the broker is ready, and its problems.
#[derive(Debug)]
pub struct Readiness {
    /// Whether bots should be sent here.
    pub is_ready: bool,
    /// All problems, also those that do not affect readiness.
    pub(crate) problems: Vec<Diagnosis>,
}

/// The current readiness of `broker`.
///
/// Not ready while it shuts down, while a key is still to be read from Vault, while no key is loaded and fresh enough,
/// while the audit log is not writable, or does not show which clientOids were used, after the server certificate has expired, while a host of the exchange has no
/// address or no certain time, and (in strict mode) while the egress address is not confirmed. A key that Vault denies is a
/// problem, but the broker stays ready for the others.
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
        problems.extend(key.vault_problems.iter().cloned().map(|mut trouble| {
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
    if let Some(failure) = broker.audit.reserve_failure() {
        let cause = format!("the reserve of the audit log cannot be written: {failure}");
        problems.push(Diagnosis::warning("audit", cause, ""));
    }
    if let Err(unknown) = broker.orders.check_known() {
        let fix = match unknown {
            ClaimsUnknown::Reading => "",
            ClaimsUnknown::Gap => {
                "restore the rotated files of the audit log beside it and restart the broker, or run `credbroker orders accept-gap`"
            }
        };
        problems.push(Diagnosis::failed("orders", unknown.problem(), fix));
    }
    let looked_up = broker.lookups.orders();
    if looked_up > 0 {
        let cause = format!("{looked_up} orders that may have been placed are being looked up");
        problems.push(Diagnosis::warning("orders", cause, ""));
    }
    if broker.metrics.certificate_not_after.get() < broker.clock.wall_ms() / 1000 {
        let fix = "replace the files of tls.certificate and tls.key";
        problems.push(Diagnosis::failed(
            "certificate",
            "the server certificate has expired",
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
        let failure = failure.map(|failure| format!(" (last check: {failure})"));
        let cause = format!("{mismatch}{}", failure.unwrap_or_default());
        let mut problem = Diagnosis::failed("egress", cause, "");
        if !is_strict {
            problem.severity = Severity::Warning;
        }
        problems.push(problem);
    }
    for (site, host) in broker.policy().hosts() {
        if let Err(uncertain) = broker.clock.check((site, host)) {
            let host_id = format!("{site}/{}", host.as_str());
            let fix = match uncertain {
                ClockUncertain::Different(_) => {
                    format!(
                        "compare both with a third clock: if the system clock is wrong, set it; if it is right, run \
                         `credbroker clock accept {host_id}` to accept the difference"
                    )
                }
                ClockUncertain::Never | ClockUncertain::Stale(..) => String::new(),
            };
            problems.push(Diagnosis::failed("clock", uncertain.to_string(), fix).about(host_id));
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

/// The broker's state in addition to its problems, for `/readyz?verbose`.
pub(crate) fn details(broker: &Broker, problems: &FileProblems) -> Vec<String> {
    let mut lines = Vec::new();
    let keys = key_health::all(broker);
    for key in &keys {
        if let Some(version) = key.version {
            // Otherwise the age is in a problem of the key.
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
        // The troubles are already among the problems.
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
        lines.push(format!(
            "egress: at the last successful check {age_s} s ago, the exchange saw address {address}"
        ));
    }
    lines.extend(failure.map(|failure| format!("egress: last check failed: {failure}")));
    // Not once the exchange has accepted a request of that key, or another key has replaced it.
    let refused = refused.filter(|_| keys.iter().any(|key| key.address_refused_ms.is_some()));
    if let Some((address, at)) = refused {
        let age_s = now.saturating_sub(at).as_secs();
        lines.push(address_refused(address, broker.proof.expected(), age_s));
    }
    if let Some(time) = broker.budgets.edge_blocked_for() {
        lines.push(format!(
            "rate limit: the exchange blocks the egress address for {} s more; until then only one cancel per second is sent",
            time.as_secs() + 1
        ));
    }
    for host_id in broker.policy().hosts() {
        let time = broker.clock.exchange(host_id);
        if let (Some(uncertainty), Some(age)) = (time.uncertainty, time.age) {
            lines.push(format!(
                "clock {}/{}: exchange time minus system time: {} ms (+/- {} ms), measured {} s ago",
                host_id.0,
                host_id.1.as_str(),
                time.ms - broker.clock.wall_ms(),
                uncertainty.as_millis(),
                age.as_secs()
            ));
        }
    }
    for (site, host) in broker.policy().hosts() {
        if let Some(accepted) = broker.clock.accepted((site, host)) {
            lines.push(format!(
                "clock {site}/{}: {} has accepted this difference until the broker restarts: the exchange's clock is {}",
                host.as_str(),
                accepted.by,
                clock::difference(accepted.ms)
            ));
        }
    }
    let (connections, calls) = broker.admission.now();
    lines.push(format!(
        "bots: {connections} open connection(s), {calls} call(s) in flight"
    ));
    for (what, problems) in &problems.rejected {
        for problem in problems {
            lines.push(format!("{what}{RELOAD_FAILED} Problem: {problem}"));
        }
    }
    let warnings = problems.warnings.iter();
    lines.extend(warnings.map(|warning| format!("warning: {warning}")));
    lines
}

/// The line about a request that the exchange rejected for its address.
fn address_refused(address: Option<IpAddr>, expected: IpAddr, age_s: u64) -> String {
    let seen = address.map_or(expected, |address| address.to_canonical());
    let (shown, fix) = if seen == expected {
        let fix = format!("Add {seen} to its whitelist.");
        (seen.to_string(), fix)
    } else {
        let fix = advice::unexpected_address(seen, expected);
        (format!("{seen} (not the expected {expected})"), fix)
    };
    format!(
        "egress: {age_s} s ago the exchange rejected a request because {shown} is not on the whitelist of its key (400006). Find the \
         key with `credbroker keys list`. {fix}"
    )
}

/// The broker's state as gauges, computed at each scrape.
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
        let help = "1 while /readyz returns ready, otherwise 0; a single key may still be unavailable, see \
                    credbroker_key_available";
        gauge(gauges, "ready", help, [([], i64::from(is_ready))])?;
        encode_keys(&keys, gauges)?;
        encode_clock(broker, gauges)?;
        encode_egress(broker, gauges)?;
        encode_files(&self.problems.borrow(), gauges)?;
        encode_audit(&broker.audit, gauges)?;
        encode_orders(broker, gauges)?;
        encode_budgets(broker, gauges)?;
        encode_process(broker, gauges)
    }
}

/// Prometheus's standard metrics of a process, which all programs export under the same names.
#[derive(Debug)]
pub(crate) struct ProcessMetrics;

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let process = hardened();
        let help = "Maximum number of open file descriptors";
        let value = process.map(|process| ([], process.descriptors));
        gauge(&mut encoder, "max_fds", help, value)?;
        let help = "Unix time in seconds when the process started";
        let value = process.map(|process| ([], process.started_s));
        gauge(&mut encoder, "start_time_seconds", help, value)
    }
}

/// Encodes a gauge with its `values` and their labels. Adds a full stop to `help`, as the registry does for its metrics.
fn gauge<const N: usize, V: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    values: impl IntoIterator<Item = ([(&'static str, String); N], V)>,
) -> fmt::Result {
    let help = format!("{help}.");
    let mut gauge = encoder.encode_descriptor(name, &help, None, MetricType::Gauge)?;
    for (labels, value) in values {
        // Encoded as a family, a gauge without labels would get empty braces.
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
    let help = "1 while the key is loaded and fresh enough for all requests, including risk-increasing ones, otherwise 0, \
                by account and key";
    let values = keys().map(|(labels, key)| (labels, i64::from(key.is_available)));
    gauge(gauges, "key_available", help, values)?;
    let help = "Seconds since Vault last confirmed the key, by account and key; absent while no key is loaded";
    let values = keys().filter_map(|(labels, key)| Some((labels, key.age?.as_secs_f64())));
    gauge(gauges, "key_age_seconds", help, values)?;
    let help = "Vault version of the loaded key, by account and key; absent while no key is loaded";
    let values = keys().filter_map(|(labels, key)| Some((labels, key.version?)));
    gauge(gauges, "key_version", help, values)?;
    let help =
        "1 for the current status of the key and 0 for all others, by account, key and status";
    let values = keys().flat_map(|([account, name], key)| {
        KeyStatus::ALL.map(|status| {
            let word = ("status", status.word().to_owned());
            let labels = [account.clone(), name.clone(), word];
            (labels, i64::from(key.status == status))
        })
    });
    gauge(gauges, "key_status", help, values)?;
    let help = "Unix time in seconds when the exchange last accepted a request signed with the key, by account and key";
    let values = keys().filter_map(|(labels, key)| Some((labels, seconds(key.used_ms?))));
    gauge(gauges, "key_used_timestamp_seconds", help, values)?;
    let help = "Unix time in seconds of the last test of the key, by account and key";
    let values = keys().filter_map(|(labels, key)| Some((labels, seconds(key.tested_ms?))));
    gauge(gauges, "key_tested_timestamp_seconds", help, values)?;
    let help = "Unix time in seconds when the key expires, by account and key; absent if unknown or if the key never expires";
    let ends = |key: &KeyHealth| Some(seconds(key.info.as_ref()?.expires_at_ms?));
    let values = keys().filter_map(|(labels, key)| Some((labels, ends(key)?)));
    gauge(gauges, "key_not_after_timestamp_seconds", help, values)
}

fn encode_clock(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let wall_ms = broker.clock.wall_ms();
    let host_ids = broker.policy().hosts();
    let label = |(site, host): HostId| {
        let host = host.as_str().to_owned();
        [("site", site.to_string()), ("host", host)]
    };
    let hosts = || host_ids.iter().map(|&host_id| (label(host_id), host_id));
    let times = || hosts().map(|(labels, host_id)| (labels, broker.clock.exchange(host_id)));
    let help =
        "Exchange time minus system time in seconds, by site and host; absent until measured";
    let offset = |time: ExchangeTime| time.age.map(|_| seconds(time.ms - wall_ms));
    let values = times().filter_map(|(labels, time)| Some((labels, offset(time)?)));
    gauge(gauges, "clock_offset_seconds", help, values)?;
    let help = "Maximum error in seconds of the broker's estimate of the exchange time, by site and host; absent until \
                measured; above 2, risk-increasing requests are refused";
    let values =
        times().filter_map(|(labels, time)| Some((labels, time.uncertainty?.as_secs_f64())));
    gauge(gauges, "clock_uncertainty_seconds", help, values)?;
    let help = "Seconds since the exchange time was measured, by site and host";
    let values = times().filter_map(|(labels, time)| Some((labels, time.age?.as_secs_f64())));
    gauge(gauges, "clock_age_seconds", help, values)?;
    let help = "1 while exchange time and system time differ by more than a day and no admin has accepted the \
                difference, otherwise 0, by site and host";
    let is_refused = |host_id| broker.clock.refused_difference(host_id).is_some();
    let values = hosts().map(|(labels, host_id)| (labels, i64::from(is_refused(host_id))));
    gauge(gauges, "clock_difference_refused", help, values)
}

fn encode_egress(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let proof = broker.proof.status();
    let help = "1 while the exchange has not confirmed egress.expected_ip or has reported another address, \
                otherwise 0";
    let value = i64::from(proof.mismatch.is_some());
    gauge(gauges, "egress_mismatch", help, [([], value)])?;
    let help = "Seconds since the exchange last reported the egress address; absent before the first report";
    let age = |at| broker.clock.boot().saturating_sub(at).as_secs_f64();
    let value = proof.seen.map(|(_, at)| ([], age(at)));
    gauge(gauges, "egress_proof_age_seconds", help, value)?;
    let help = "1 if the last egress IP check failed, otherwise 0";
    let value = i64::from(proof.failure.is_some());
    gauge(gauges, "egress_check_failed", help, [([], value)])
}

fn encode_files(problems: &FileProblems, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let help = "1 while a changed file cannot be loaded and its previous version is still in use, otherwise 0, by file";
    let values = ["rules", "tls"].map(|file| {
        let is_unusable = problems.rejected.contains_key(file);
        ([("file", file.to_owned())], i64::from(is_unusable))
    });
    gauge(gauges, "file_unusable", help, values)?;
    let help = "Number of warnings about files: permissions too open, CA name constraints that cannot be checked, \
                non-CA certificates ignored in the files of vault.roots and egress.roots; /readyz?verbose lists them";
    let number = problems.warnings.len();
    gauge(gauges, "file_warnings", help, [([], number)])
}

fn encode_audit(audit: &Audit, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let help = "1 while the audit log is writable, otherwise 0";
    let value = i64::from(audit.failure().is_none());
    gauge(gauges, "audit_writable", help, [([], value)])?;
    let help = "Number of audit lines that are not in the audit log yet";
    gauge(gauges, "audit_lines_waiting", help, [([], audit.waiting())])?;
    let space = audit.space();
    let help = "Free bytes of the file system of the audit log; below 64 MiB, risk-increasing requests are refused";
    let value = space.map(|space| ([], space.free));
    gauge(gauges, "audit_filesystem_avail_bytes", help, value)?;
    let help = "Size in bytes of the file system of the audit log";
    let value = space.map(|space| ([], space.total));
    gauge(gauges, "audit_filesystem_size_bytes", help, value)
}

fn encode_orders(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let orders = &broker.orders;
    let (claims, share) = orders.usage();
    let help = "Number of clientOids that are kept";
    gauge(gauges, "orders_claims", help, [([], claims)])?;
    let help = "Largest part of its share of clientOids that a bot has used, from 0 to 1; at 1, its oldest accepted orders are \
                forgotten after 15 minutes, and then its new orders are refused";
    gauge(gauges, "orders_claims_share", help, [([], share)])?;
    let now_ms = broker.clock.measured_ms(None);
    let held_s = now_ms.map(|now_ms| ([], orders.held_s(now_ms)));
    let help = "How many seconds into the past the broker knows every clientOid that was used: normally orders.window_hours, \
                less after older ones were forgotten or audit lines were missing; absent while the exchange's time is unknown";
    gauge(gauges, "orders_window_seconds", help, held_s)
}

fn encode_budgets(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let used = broker.budgets.used();
    let each = |value: fn(&UsedPool) -> u64| {
        let values = used.iter().map(move |used| {
            let (account, pool) = (used.account.to_string(), used.pool.as_str().to_owned());
            ([("account", account), ("pool", pool)], value(used))
        });
        values.collect::<Vec<_>>()
    };
    let help = "Weight per 30 s that KuCoin allows the account, or the address in pool public";
    gauge(gauges, "budget_quota", help, each(|used| used.level.quota))?;
    let help = "Weight that is left in the current window";
    gauge(gauges, "budget_left", help, each(|used| used.level.left))?;
    let help = "Weight that the broker has sent in the current window; budget_quota - budget_left - budget_sent was used by others";
    gauge(gauges, "budget_sent", help, each(|used| used.level.sent))?;
    let help = "Number of requests that wait for the budget";
    gauge(
        gauges,
        "budget_waiting",
        help,
        each(|used| used.waiting as u64),
    )?;
    let help = "1 while the exchange blocks the egress address for too many requests, otherwise 0";
    let is_blocked = broker.budgets.edge_blocked_for().is_some();
    gauge(gauges, "edge_blocked", help, [([], i64::from(is_blocked))])
}

fn encode_process(broker: &Broker, gauges: &mut DescriptorEncoder<'_>) -> fmt::Result {
    let process = hardened();
    let help = "1 while memory is locked and cannot be swapped out, otherwise 0";
    let value = process.map(|process| ([], i64::from(process.is_locked)));
    gauge(gauges, "memory_locked", help, value)?;
    let help =
        "1 while core dumps are disabled and only root can read the process memory, otherwise 0";
    let value = process.map(|process| ([], i64::from(process.is_undumpable)));
    gauge(gauges, "undumpable", help, value)?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let help = "The version of the program, as a label; always 1";
    gauge(gauges, "build_info", help, [([("version", version)], 1)])?;
    let help = "Number of running tasks of the async runtime";
    let runtime = Handle::try_current().ok();
    let tasks = runtime.map(|runtime| ([], runtime.metrics().num_alive_tasks()));
    gauge(gauges, "tasks", help, tasks)?;
    let (connections, calls) = broker.admission.now();
    let help = "Number of open bot connections";
    gauge(gauges, "connections", help, [([], connections)])?;
    let help = "Number of bot calls in flight";
    gauge(gauges, "calls_in_flight", help, [([], calls)])
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53 milliseconds")]
fn seconds(ms: i64) -> f64 {
    ms as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejected_address_is_to_be_whitelisted_only_if_it_is_the_expected_one() {
        let [expected, other] = ["203.0.113.7", "198.51.100.9"].map(|ip| ip.parse().unwrap());
        let start = "egress: 5 s ago the exchange rejected a request because ";
        let middle = " is not on the whitelist of its key (400006). Find the key with `credbroker keys list`. ";
        for address in [None, Some(expected)] {
            assert_eq!(
                address_refused(address, expected, 5),
                format!("{start}203.0.113.7{middle}Add 203.0.113.7 to its whitelist.")
            );
        }
        let line = address_refused(Some(other), expected, 5);
        let both = "198.51.100.9 (not the expected 203.0.113.7)";
        let fix = "Find out which address is right. If it is 203.0.113.7, correct the route";
        let begin = format!("{start}{both}{middle}{fix}");
        assert!(line.starts_with(&begin), "{line}");
    }
}
