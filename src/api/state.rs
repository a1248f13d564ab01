//! How the broker is, at this moment: whether it is ready, what is wrong, and its state as gauges.

use tokio::runtime::Handle;

use super::standing::{Standing, WORDS, standings, troubles};
use crate::broker::Broker;
use crate::clock::{self, ClockUncertain, ExchangeTime, Place};
use crate::config::FileProblems;
use crate::egress::proof::ProofStatus;
use crate::keyring::{KeyStatus, Slot};
use crate::process::hardened;
use crate::telemetry::State;

/// Whether the broker can do its work, and what is wrong.
#[derive(Debug)]
pub struct Readiness {
    /// Whether bots should be sent here.
    pub is_ready: bool,
    /// One line for each thing that is wrong, also where the broker is ready all the same.
    pub reasons: Vec<String>,
}

/// Asks `broker` how it is.
///
/// Not ready while it stops, while Vault has not said a word about a key, while no key at all is in memory and fresh
/// enough, while a host of the exchange has no address or no known time, and while requests do not provably leave from
/// the expected address. A key that Vault refuses is a reason, but does not take the others down.
pub fn readiness(broker: &Broker) -> Readiness {
    let mut reasons = Vec::new();
    let mut is_ready = !broker.is_draining();
    if !is_ready {
        reasons.push("the broker is stopping".to_owned());
    }
    let keys = broker.keyring.status();
    is_ready &= keys.is_empty()
        || keys
            .iter()
            .any(|key| matches!(key.slot, Slot::Ready { .. }) && !key.is_too_old);
    for key in keys {
        is_ready &= !matches!(key.slot, Slot::Waiting(_));
        let tell = |trouble| format!("key {}/{}: {trouble}", key.account, key.name);
        reasons.extend(troubles(&key).into_iter().map(tell));
    }
    if let Some(failure) = broker.audit.failure() {
        is_ready = false;
        reasons.push(format!("audit: {failure}; what adds risk is refused"));
    }
    if broker.metrics.certificate_ends.get() < broker.clock.wall_ms() / 1000 {
        is_ready = false;
        reasons.push("the server certificate has ended; put a new one in its place".to_owned());
    }
    for missing in broker.egress.without_address(&broker.policy().places()) {
        is_ready = false;
        reasons.push(format!("exchange: {missing}"));
    }
    let ProofStatus {
        mismatch,
        is_strict,
        failure,
        ..
    } = broker.proof.status();
    if let Some(mismatch) = mismatch {
        is_ready &= !is_strict;
        let failure = failure.map(|failure| format!(" (last question: {failure})"));
        reasons.push(format!("egress: {mismatch}{}", failure.unwrap_or_default()));
    }
    for (site, host) in broker.policy().places() {
        if let Err(uncertain) = broker.clock.check((site, host)) {
            is_ready = false;
            let host = host.as_str();
            let fix = match uncertain {
                ClockUncertain::Different(_) => format!(
                    "; set the clock that is wrong, or run `credbroker clock accept {site}/{host}`"
                ),
                ClockUncertain::Never | ClockUncertain::Stale(..) => String::new(),
            };
            reasons.push(format!("clock {site}/{host}: {uncertain}{fix}"));
        }
    }
    Readiness { is_ready, reasons }
}

/// What is in force, beside what is wrong: for `/readyz?verbose`.
pub fn details(broker: &Broker, problems: &FileProblems) -> Vec<String> {
    let mut lines = Vec::new();
    for key in broker.keyring.status() {
        if let Slot::Ready {
            version, outage, ..
        } = &key.slot
        {
            // Otherwise it has been told as what is wrong.
            let age = key.age.filter(|_| outage.is_none() && !key.is_too_old);
            let confirmed = age.map(|age| format!(", confirmed by Vault {} s ago", age.as_secs()));
            lines.push(format!(
                "key {}/{}: version {version} in memory{}",
                key.account,
                key.name,
                confirmed.unwrap_or_default()
            ));
        }
    }
    for key in standings(broker) {
        let name = format!("key {}/{}", key.account, key.name);
        lines.push(format!("{name}: {}", key.status));
        // The troubles have been told as what is wrong.
        let reasons = key.reasons.iter();
        let others = reasons.filter(|reason| !key.troubles.contains(reason));
        lines.extend(others.map(|reason| format!("{name}: {reason}")));
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
    for place in broker.policy().places() {
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
    for (site, host) in broker.policy().places() {
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

/// The broker's state as gauges.
pub fn gauges(broker: &Broker) -> Vec<State> {
    let mut states = vec![State::single(
        "ready",
        "1 while /readyz answers ready; some keys may still be unavailable: see key_available",
        flag(readiness(broker).is_ready),
    )];
    states.extend(of_keys(&broker.keyring.status()));
    states.extend(of_standings(&standings(broker)));
    states.extend(of_clock(broker));
    states.extend(of_egress(broker));
    states.extend(of_process(broker));
    states
}

fn of_keys(keys: &[KeyStatus]) -> [State; 3] {
    let state = |name, help, value: &dyn Fn(&KeyStatus) -> Option<f64>| State {
        name,
        help,
        values: keys
            .iter()
            .filter_map(|key| {
                let (account, name) = (key.account.to_string(), key.name.to_string());
                Some((vec![("account", account), ("key", name)], value(key)?))
            })
            .collect(),
    };
    [
        state(
            "key_available",
            "1 while the key is in memory and fresh enough for everything",
            &|key| {
                Some(flag(
                    matches!(key.slot, Slot::Ready { .. }) && !key.is_too_old,
                ))
            },
        ),
        state(
            "key_age_seconds",
            "Since Vault last confirmed the key; absent while it is not in memory",
            &|key| key.age.map(|age| age.as_secs_f64()),
        ),
        state(
            "key_version",
            "Version of the key in memory, as Vault counts",
            &|key| match &key.slot {
                Slot::Ready { version, .. } => Some(count(*version)),
                Slot::Gone(_) | Slot::Waiting(_) => None,
            },
        ),
    ]
}

fn of_standings(keys: &[Standing]) -> [State; 4] {
    let labels = |key: &Standing| {
        let (account, name) = (key.account.to_string(), key.name.to_string());
        vec![("account", account), ("key", name)]
    };
    let of_words = |key: &Standing| {
        WORDS.map(|word| {
            let mut labels = labels(key);
            labels.push(("status", word.to_owned()));
            (labels, flag(key.status == word))
        })
    };
    let time = |name, help, value: &dyn Fn(&Standing) -> Option<i64>| State {
        name,
        help,
        values: keys
            .iter()
            .filter_map(|key| {
                #[expect(clippy::cast_precision_loss, reason = "far below 2^53 milliseconds")]
                Some((labels(key), value(key)? as f64 / 1000.0))
            })
            .collect(),
    };
    [
        State {
            name: "key_status",
            help: "1 for the word that tells how the key is, 0 for the others",
            values: keys.iter().flat_map(of_words).collect(),
        },
        time(
            "key_used_timestamp_seconds",
            "When the exchange last took a request that the key signed, Unix time",
            &|key| key.used_ms,
        ),
        time(
            "key_tested_timestamp_seconds",
            "When the key was last tested, Unix time",
            &|key| key.tested_ms,
        ),
        time(
            "key_not_after_timestamp_seconds",
            "When the key ends, Unix time; absent where it does not",
            &|key| key.info.as_ref()?.expires_at_ms,
        ),
    ]
}

fn of_clock(broker: &Broker) -> [State; 4] {
    let wall_ms = broker.clock.wall_ms();
    let times: Vec<_> = broker
        .policy()
        .places()
        .into_iter()
        .map(|place| (place, broker.clock.exchange(place)))
        .collect();
    let labels = |(site, host): Place| {
        let (site, host) = (site.to_string(), host.as_str().to_owned());
        vec![("site", site), ("host", host)]
    };
    let state = |name, help, value: &dyn Fn(&ExchangeTime) -> Option<f64>| State {
        name,
        help,
        values: times
            .iter()
            .filter_map(|(place, time)| Some((labels(*place), value(time)?)))
            .collect(),
    };
    let refused = |place: Place| {
        let refused = broker.clock.refused_difference(place).is_some();
        (labels(place), flag(refused))
    };
    [
        state(
            "clock_offset_seconds",
            "The exchange's time less the system's",
            &|time| {
                #[expect(clippy::cast_precision_loss, reason = "far below 2^53 milliseconds")]
                time.age.map(|_| (time.ms - wall_ms) as f64 / 1000.0)
            },
        ),
        state(
            "clock_uncertainty_seconds",
            "How far the exchange's time may be off; past 2 what adds risk is refused",
            &|time| {
                time.uncertainty
                    .map(|uncertainty| uncertainty.as_secs_f64())
            },
        ),
        state(
            "clock_age_seconds",
            "Since the exchange's time was measured",
            &|time| time.age.map(|age| age.as_secs_f64()),
        ),
        State {
            name: "clock_difference_refused",
            help: "1 while the exchange's time is more than a day from the system's and no admin has accepted that",
            values: times.iter().map(|(place, _)| refused(*place)).collect(),
        },
    ]
}

fn of_egress(broker: &Broker) -> [State; 3] {
    let proof = broker.proof.status();
    let now = broker.clock.boot();
    let age = proof
        .seen
        .map(|(_, at)| now.saturating_sub(at).as_secs_f64());
    [
        State::single(
            "egress_mismatch",
            "1 while requests do not provably leave from the expected address",
            flag(proof.mismatch.is_some()),
        ),
        State::known(
            "egress_proof_age_seconds",
            "Since the exchange last said from which address requests come",
            age,
        ),
        State::single(
            "egress_check_failed",
            "1 while the last question for the egress address has no answer",
            flag(proof.failure.is_some()),
        ),
    ]
}

fn of_process(broker: &Broker) -> [State; 8] {
    let (connections, calls) = broker.admission.now();
    [
        State::known(
            "memory_locked",
            "1 while memory cannot be swapped out",
            hardened().map(|process| flag(process.is_locked)),
        ),
        State::known(
            "undumpable",
            "1 while nobody but root can read the process's memory",
            hardened().map(|process| flag(process.is_undumpable)),
        ),
        State::known(
            "descriptors_limit",
            "Files and connections that the process may have open",
            hardened().map(|process| count(process.descriptors)),
        ),
        State::single(
            "audit_writable",
            "1 while the last line could be written to the audit file",
            flag(broker.audit.failure().is_none()),
        ),
        State::known(
            "start_time_seconds",
            "When the process started, Unix time",
            hardened().map(|process| count(process.started_s)),
        ),
        State::known(
            "tasks",
            "Tasks of the runtime that have not ended",
            Handle::try_current()
                .ok()
                .map(|runtime| count(runtime.metrics().num_alive_tasks() as u64)),
        ),
        State::single(
            "connections",
            "Open connections of bots",
            count(connections as u64),
        ),
        State::single(
            "calls_in_flight",
            "Calls of bots that have not ended",
            count(calls as u64),
        ),
    ]
}

fn flag(is_set: bool) -> f64 {
    if is_set { 1.0 } else { 0.0 }
}

#[expect(clippy::cast_precision_loss, reason = "far below 2^53")]
fn count(number: u64) -> f64 {
    number as f64
}
