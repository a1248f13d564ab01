//! The broker's own questions to the exchange: what time is it, and from which address do we come?
//!
//! They go the way that orders go. A host is asked at start and every half minute for the time, the spot host every few
//! minutes for the address; at once when an answer to a bot gives reason to doubt what is known.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use super::Broker;
use crate::base::backoff::Backoff;
use crate::base::lock::Mutex;
use crate::clock::{self, Clock, HostId, Measured, Sample, WITNESSES_APART};
use crate::egress::{ConnectError, Egress, SendError};
use crate::kucoin::Host;
use crate::kucoin::broker_query::{self, BrokerQuery};
use crate::telemetry::chain;

/// How often the time is asked for: often enough that a good measurement is always at hand.
const TIME_EVERY: Duration = Duration::from_secs(30);

/// How soon after an answer that could not be believed; long enough for an answer from a cache to show itself.
const DOUBT_AFTER: Duration = Duration::from_secs(1);

/// How often the address is asked for while it is not the expected one.
const MISMATCH_EVERY: Duration = Duration::from_secs(5);

/// The least wait between two questions, whatever is in doubt.
const AT_LEAST: Duration = Duration::from_millis(250);

/// Waits after a failure. Never none: a host that answers nonsense is not asked without pause.
const BACKOFF: Backoff = Backoff::new(AT_LEAST, Duration::from_secs(30)).at_least(0.5);

/// An answer that takes longer tells little about the time, and a call waits for it after a 400002.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);

/// Calls for questions to be asked at once.
#[derive(Debug, Default)]
pub(crate) struct RecheckSignals {
    address: Notify,
    time: Notify,
    /// Hosts that have refused a timestamp and are being asked, with the answer whether their time is known now.
    refuted: Mutex<BTreeMap<HostId, watch::Receiver<Option<bool>>>>,
}

impl RecheckSignals {
    /// The address may have changed.
    pub(crate) fn address(&self) {
        self.address.notify_one();
    }

    /// The time may be off.
    pub(crate) fn time(&self) {
        self.time.notify_waiters();
    }
}

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QueryError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It took too long.
    #[error("no answer within {} ms", ANSWER_WITHIN.as_millis())]
    Late,
    /// An answer, but not to this question.
    #[error("unexpected answer (HTTP {0})")]
    Other(u16),
    /// Lost on the way.
    #[error(transparent)]
    Send(#[from] SendError),
}

/// Keeps asking `host_id` for its time.
pub(crate) async fn watch_time(broker: Arc<Broker>, host_id: HostId) {
    let mut backoff = BACKOFF;
    let mut is_different = false;
    loop {
        // Before the question, so that a doubt that comes up meanwhile is not missed.
        let doubt = broker.rechecks.time.notified();
        let measured = broker.measure(host_id, false).await;
        broker.log_difference(host_id, &mut is_different);
        let wait = match measured {
            Ok(Measured::Absurd | Measured::Implausible(_)) => {
                // Not sooner, whatever is in doubt: asked again at once, a cache would agree with itself.
                sleep(DOUBT_AFTER).await;
                continue;
            }
            Ok(_) => {
                backoff.reset();
                TIME_EVERY.mul_f64(0.9 + 0.2 * fastrand::f64())
            }
            Err(_) => backoff.wait(),
        };
        // A doubt shortens the wait, but never to nothing: a host that answers nonsense is not asked without pause.
        sleep(wait.min(AT_LEAST)).await;
        let _ = timeout(wait.saturating_sub(AT_LEAST), doubt).await;
    }
}

/// Keeps asking a spot host from which address requests come.
pub(crate) async fn watch_address(broker: Arc<Broker>, every: Duration) {
    let mut backoff = BACKOFF;
    loop {
        // All sites see the same address; ask one that the rules name.
        let site = broker.policy().accounts().map(|account| account.site).min();
        let wait = match broker.prove((site.unwrap_or_default(), Host::Spot)).await {
            Ok(()) => {
                backoff.reset();
                // As long as orders wait for it, the way back is looked for more often.
                match broker.proof.status().mismatch {
                    Some(_) => every.min(MISMATCH_EVERY),
                    None => every,
                }
            }
            Err(_) => backoff.wait().min(every),
        };
        sleep(wait.min(AT_LEAST)).await;
        let doubt = broker.rechecks.address.notified();
        let _ = timeout(wait.saturating_sub(AT_LEAST), doubt).await;
    }
}

impl Broker {
    /// Measures the time at `host_id` once. `is_refuted`: it has just refused a timestamp of ours.
    async fn measure(&self, host_id: HostId, is_refuted: bool) -> Result<Measured, QueryError> {
        let (site, host) = host_id;
        let (server_ms, asked, answered) = self
            .ask(host_id, BrokerQuery::Time)
            .await
            .inspect_err(|error| {
                self.metrics.clock_failures.inc();
                tracing::warn!(%site, host = host.as_str(), error = chain(error), "exchange time check failed; keeping last offset");
            })?;
        let sample = Sample {
            asked,
            answered,
            server_ms,
        };
        let measured = self.clock.take_in(host_id, sample, is_refuted);
        match measured {
            Measured::Absurd => {
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

    /// Logs that the exchange's time and the system's have come to be more than a day apart, or are not any more.
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
                "exchange clock is {}; risk-increasing requests are refused until both agree or an admin runs `credbroker clock accept {site}/{name}`",
                clock::difference(difference_ms),
            ),
            None => {
                tracing::info!(%site, host = name, "exchange clock difference resolved or accepted; risk-increasing requests allowed again");
            }
        }
    }

    /// Finds out the time at a host that has refused a timestamp; returns whether it is known now. All calls that were
    /// refused wait for the same answer, and none of them can stop it by giving up. `since_signing`: how long ago
    /// the refused timestamp was signed; a measurement made since then is enough.
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
                // An error means that the last question ended in a panic.
                .is_none_or(|answer| answer.borrow().is_some() || answer.has_changed().is_err());
            if is_done {
                let (tell, answer) = watch::channel(None);
                refuted.insert(host_id, answer);
                let broker = Arc::clone(self);
                tokio::spawn(async move {
                    let is_known = broker.measure_refuted(host_id).await.is_ok();
                    tell.send_replace(Some(is_known));
                });
            }
            let Some(answer) = refuted.get(&host_id) else {
                return false;
            };
            answer.clone()
        };
        // An error means that the question ended in a panic.
        answer
            .wait_for(Option::is_some)
            .await
            .is_ok_and(|is_known| *is_known == Some(true))
    }

    /// One answer that disagrees with what is known needs a second one; the refusal was the first witness.
    async fn measure_refuted(&self, host_id: HostId) -> Result<(), QueryError> {
        if let Measured::Implausible(_) = self.measure(host_id, true).await? {
            sleep(WITNESSES_APART).await;
            self.measure(host_id, true).await?;
        }
        Ok(())
    }

    /// Asks once from which address requests come.
    async fn prove(&self, host_id: HostId) -> Result<(), QueryError> {
        let asked = self.ask(host_id, BrokerQuery::MyIp).await;
        let (address, asked, _): (IpAddr, _, _) = asked.inspect_err(|error| {
            let reason = chain(error);
            tracing::warn!(
                error = reason,
                "egress IP check failed; keeping last result"
            );
            self.proof.failed(reason);
        })?;
        if self.proof.seen(address, asked) {
            if let Some(mismatch) = self.proof.status().mismatch {
                tracing::error!(%address, "{mismatch}");
            } else {
                tracing::info!(%address, "egress IP confirmed");
            }
        }
        Ok(())
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        host_id: HostId,
        broker_query: BrokerQuery,
    ) -> Result<(T, Duration, Duration), QueryError> {
        ask(&self.egress, &self.clock, host_id, broker_query).await
    }
}

/// Asks `host_id` and returns `data` of its answer, with the times since boot between which it was given.
///
/// # Errors
/// When no answer comes, or another one than the API describes.
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
    let data =
        broker_query::data(answer.body()).ok_or(QueryError::Other(answer.status().as_u16()))?;
    Ok((data, asked, answered))
}
