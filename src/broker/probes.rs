//! The broker's own checks at the exchange: the exchange's time and the broker's egress address.
//!
//! They use the same network path as orders. The time is checked for each host at start and every half minute, the egress
//! address at a spot host every few minutes, and both early if an answer to a bot suggests a change.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::sync::{Notify, mpsc, watch};
use tokio::time::{sleep, timeout};

use super::Broker;
use crate::base::backoff::Backoff;
use crate::base::lock::Mutex;
use crate::clock::{self, Clock, HostId, MIN_SAMPLE_GAP, Measured, Sample};
use crate::egress::{ConnectError, Egress, SendError};
use crate::kucoin::Host;
use crate::kucoin::broker_query::{self, BrokerQuery};
use crate::telemetry::chain;

/// How often the time is measured: often enough that a recent measurement is always available.
const TIME_EVERY: Duration = Duration::from_secs(30);

/// The wait after an invalid or implausible time: long enough that a cached answer does not confirm itself.
const IMPLAUSIBLE_RETRY_AFTER: Duration = Duration::from_secs(1);

/// How often the address is checked while it is not the expected one.
const MISMATCH_EVERY: Duration = Duration::from_secs(5);

/// The minimum wait between two checks.
const MIN_WAIT: Duration = Duration::from_millis(250);

/// The waits after failures. Never zero, so that a host with invalid answers is not flooded.
const BACKOFF: Backoff = Backoff::new(MIN_WAIT, Duration::from_secs(30)).at_least(0.5);

/// The time limit for an answer. A slower one is too inexact for the time, and calls wait for it after a 400002.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// What a probe drops once it has ended its first check.
pub(crate) type FirstCheck = mpsc::Sender<()>;

/// Requests early checks.
#[derive(Debug, Default)]
pub(crate) struct RecheckSignals {
    address: Notify,
    time: Notify,
    /// Hosts that rejected a timestamp, and whether their time has been measured again: `None` while that is going on.
    refuted: Mutex<BTreeMap<HostId, watch::Receiver<Option<bool>>>>,
}

impl RecheckSignals {
    /// Requests a check of the egress address, which may have changed.
    pub(crate) fn address(&self) {
        self.address.notify_one();
    }

    /// Requests a measurement of the time, which may be off.
    pub(crate) fn time(&self) {
        self.time.notify_waiters();
    }
}

/// Why a check failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueryError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The edge of the exchange blocks the egress address for this long.
    #[error("the exchange blocks the egress address for another {} s", .0.as_secs() + 1)]
    EdgeBlocked(Duration),
    /// No answer within the time limit.
    #[error("no answer within {} ms", ANSWER_WITHIN.as_millis())]
    Late,
    /// An answer without the expected data.
    #[error("unexpected answer (HTTP {0})")]
    Other(u16),
    /// Sending failed, or the answer was lost.
    #[error(transparent)]
    Send(#[from] SendError),
}

/// Measures the time of `host_id` in a loop.
pub(crate) async fn watch_time(
    broker: Arc<Broker>,
    host_id: HostId,
    mut first: Option<FirstCheck>,
) {
    let mut backoff = BACKOFF;
    let mut is_different = false;
    loop {
        // Before the measurement, so that a signal during it is not missed.
        let recheck = broker.rechecks.time.notified();
        let measured = broker.measure(host_id, false).await;
        drop(first.take());
        broker.log_difference(host_id, &mut is_different);
        let wait = match measured {
            Ok(Measured::Invalid | Measured::Implausible(_)) => {
                // Not earlier, even on a signal: a cache would confirm its own answer.
                sleep(IMPLAUSIBLE_RETRY_AFTER).await;
                continue;
            }
            Ok(_) => {
                backoff.reset();
                TIME_EVERY.mul_f64(0.9 + 0.2 * fastrand::f64())
            }
            Err(_) => backoff.wait(),
        };
        // A signal shortens the wait, but never to zero, so that a host with invalid answers is not flooded.
        sleep(wait.min(MIN_WAIT)).await;
        let _ = timeout(wait.saturating_sub(MIN_WAIT), recheck).await;
    }
}

/// Checks the egress address at a spot host in a loop.
pub(crate) async fn watch_address(
    broker: Arc<Broker>,
    every: Duration,
    mut first: Option<FirstCheck>,
) {
    let mut backoff = BACKOFF;
    loop {
        // All sites see the same address: use one that the rules name.
        let site = broker.policy().accounts().map(|account| account.site).min();
        let proven = broker.prove((site.unwrap_or_default(), Host::Spot)).await;
        drop(first.take());
        let wait = match proven {
            Ok(()) => {
                backoff.reset();
                // Orders may be refused until the address is right again: check more often.
                match broker.proof.status().mismatch {
                    Some(_) => every.min(MISMATCH_EVERY),
                    None => every,
                }
            }
            Err(_) => backoff.wait().min(every),
        };
        sleep(wait.min(MIN_WAIT)).await;
        let recheck = broker.rechecks.address.notified();
        let _ = timeout(wait.saturating_sub(MIN_WAIT), recheck).await;
    }
}

impl Broker {
    /// Measures the time of `host_id` once. `is_refuted`: the host has just rejected a timestamp.
    async fn measure(&self, host_id: HostId, is_refuted: bool) -> Result<Measured, QueryError> {
        let (site, host) = host_id;
        let (server_ms, asked, answered) = self
            .ask(host_id, BrokerQuery::Time)
            .await
            .inspect_err(|error| {
                self.metrics.clock_failures.inc();
                tracing::warn!(%site, host = host.as_str(), exception.message = chain(error), "exchange time check failed; keeping last offset");
            })?;
        let sample = Sample {
            asked,
            answered,
            server_ms,
        };
        let measured = self.clock.apply_sample(host_id, sample, is_refuted);
        match measured {
            Measured::Invalid => {
                self.metrics.clock_jumps_refused.inc();
                tracing::warn!(%site, host = host.as_str(), server_ms, "invalid exchange time; ignored");
            }
            Measured::Implausible(by_ms) => {
                self.metrics.clock_jumps_refused.inc();
                tracing::warn!(%site, host = host.as_str(), by_ms, server_ms, "implausible exchange time; ignored, measuring again");
            }
            Measured::Moved(by_ms) => {
                tracing::warn!(%site, host = host.as_str(), by_ms, "exchange clock stepped; offset updated");
            }
            Measured::Agreed | Measured::Applied => {}
        }
        Ok(measured)
    }

    /// Logs when the exchange's clock and the system's become more than a day apart, and when that ends or is accepted.
    fn log_difference(&self, (site, host): HostId, is_different: &mut bool) {
        let refused = self.clock.refused_difference((site, host));
        if refused.is_some() == std::mem::replace(is_different, refused.is_some()) {
            return;
        }
        let name = host.as_str();
        match refused {
            Some(difference_ms) => tracing::error!(
                %site,
                host = name,
                difference_ms,
                "exchange clock is {}; risk-increasing requests are refused until the clocks agree or an admin runs `credbroker clock accept {site}/{name}`",
                clock::difference(difference_ms),
            ),
            None => {
                tracing::info!(%site, host = name, "exchange clock difference resolved or accepted; risk-increasing requests allowed again");
            }
        }
    }

    /// Measures the time of a host that rejected a timestamp; returns whether that succeeded. All calls that the host
    /// rejected wait for the same measurement, and a call that stops waiting does not stop it. `since_signing`: how long ago
    /// the rejected timestamp was signed; a measurement that is younger is enough.
    pub(super) async fn resync_time(
        self: &Arc<Self>,
        host_id: HostId,
        since_signing: Duration,
    ) -> bool {
        let measured = self.clock.exchange(host_id).age;
        if measured.is_some_and(|age| age < since_signing) {
            return true;
        }
        let mut answer = {
            let mut refuted = self.rechecks.refuted.lock();
            let is_done = refuted
                .get(&host_id)
                // An error means that the last measurement panicked.
                .is_none_or(|answer| answer.borrow().is_some() || answer.has_changed().is_err());
            if is_done {
                let (done, answer) = watch::channel(None);
                refuted.insert(host_id, answer);
                let broker = Arc::clone(self);
                tokio::spawn(async move {
                    let is_known = broker.measure_refuted(host_id).await.is_ok();
                    done.send_replace(Some(is_known));
                });
            }
            let Some(answer) = refuted.get(&host_id) else {
                return false;
            };
            answer.clone()
        };
        // An error means that the measurement panicked.
        answer
            .wait_for(Option::is_some)
            .await
            .is_ok_and(|is_known| *is_known == Some(true))
    }

    /// Measures once more if the first measurement is implausible: the rejection and the two measurements confirm a changed time.
    async fn measure_refuted(&self, host_id: HostId) -> Result<(), QueryError> {
        if let Measured::Implausible(_) = self.measure(host_id, true).await? {
            sleep(MIN_SAMPLE_GAP).await;
            self.measure(host_id, true).await?;
        }
        Ok(())
    }

    /// Checks the egress address once.
    async fn prove(&self, host_id: HostId) -> Result<(), QueryError> {
        let asked = self.ask(host_id, BrokerQuery::MyIp).await;
        let (address, asked, _): (IpAddr, _, _) = asked.inspect_err(|error| {
            let reason = chain(error);
            if self.proof.status().seen.is_some() {
                tracing::warn!(
                    exception.message = reason,
                    "egress IP check failed; keeping last result"
                );
            } else {
                tracing::warn!(
                    exception.message = reason,
                    "egress IP check failed; address not confirmed yet"
                );
            }
            self.proof.failed(reason);
        })?;
        if self.proof.seen(address, asked) {
            if let Some(mismatch) = self.proof.status().mismatch {
                tracing::error!(egress.address = %address, "{mismatch}");
            } else {
                tracing::info!(egress.address = %address, "egress IP confirmed");
            }
        }
        Ok(())
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        host_id: HostId,
        broker_query: BrokerQuery,
    ) -> Result<(T, Duration, Duration), QueryError> {
        self.budgets.take_check().map_err(QueryError::EdgeBlocked)?;
        let began = self.clock.boot();
        let asked = ask(&self.egress, &self.clock, host_id, broker_query).await;
        asked.inspect_err(|error| {
            if let QueryError::EdgeBlocked(time) = error {
                self.edge_blocked(*time, began);
            }
        })
    }
}

/// Sends a query to `host_id` and returns `data` of its answer, with the times since boot before and after the query.
///
/// # Errors
/// When no answer comes, or its data is not as documented.
pub(crate) async fn ask<T: DeserializeOwned>(
    egress: &Egress,
    clock: &Clock,
    host_id: HostId,
    broker_query: BrokerQuery,
) -> Result<(T, Duration, Duration), QueryError> {
    let connection = egress.connect(host_id, true).await?;
    let asked = clock.boot();
    let answer = timeout(ANSWER_WITHIN, egress.ask(connection, broker_query)).await;
    let answered = clock.boot();
    let answer = answer.map_err(|_| QueryError::Late)??;
    match broker_query::data(answer.body()) {
        Some(data) => Ok((data, asked, answered)),
        None => Err(
            match broker_query::edge_block(&answer, || clock.exchange(host_id).as_system_time()) {
                Some(time) => QueryError::EdgeBlocked(time),
                None => QueryError::Other(answer.status().as_u16()),
            },
        ),
    }
}
