//! Runs the probes: the time of every host that the rules' accounts use, and the egress address.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use crate::broker::probes::FirstCheck;
use crate::broker::{Broker, probes};
use crate::clock::HostId;
use crate::policy::Policy;

/// The running probes; they end when this drops.
pub(crate) struct Probes {
    times: BTreeMap<HostId, AbortHandle>,
    address: Option<AbortHandle>,
    /// How often to check the egress address.
    address_every: Duration,
    /// What each probe drops after its first check; `None` once somebody waits for that.
    first: Option<(FirstCheck, mpsc::Receiver<()>)>,
}

impl Probes {
    /// Starts nothing until [`Probes::follow`].
    pub(crate) fn new(address_every: Duration) -> Self {
        Self {
            times: BTreeMap::new(),
            address: None,
            address_every,
            first: Some(mpsc::channel(1)),
        }
    }

    /// Returns once each running probe has ended its first check, successful or not.
    pub(crate) fn first_checks(&mut self) -> impl Future<Output = ()> + use<> {
        let ended = self.first.take().map(|(_, ended)| ended);
        async move {
            if let Some(mut ended) = ended {
                ended.recv().await;
            }
        }
    }

    /// Checks the egress address, and the time of the hosts of these rules and of no others.
    pub(crate) fn follow(&mut self, broker: &Arc<Broker>, policy: &Policy) {
        let host_ids = policy.hosts();
        let first = || self.first.as_ref().map(|(first, _)| first.clone());
        if self.address.as_ref().is_none_or(AbortHandle::is_finished) {
            let probe = probes::watch_address(Arc::clone(broker), self.address_every, first());
            self.address = Some(tokio::spawn(probe).abort_handle());
        }
        self.times.retain(|host_id, task| {
            // A probe that has panicked is started again.
            let stays = !task.is_finished() && host_ids.contains(host_id);
            if !stays {
                task.abort();
            }
            stays
        });
        for host_id in host_ids {
            self.times.entry(host_id).or_insert_with(|| {
                let probe = probes::watch_time(Arc::clone(broker), host_id, first());
                tokio::spawn(probe).abort_handle()
            });
        }
    }
}

impl Drop for Probes {
    fn drop(&mut self) {
        self.times
            .values()
            .chain(&self.address)
            .for_each(AbortHandle::abort);
    }
}
