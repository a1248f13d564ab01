//! Runs the probes: the time of every host that the rules' accounts use, and the egress address.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::broker::{Broker, probes};
use crate::clock::HostId;
use crate::policy::Policy;

/// The running probes; they end when this drops.
pub(crate) struct Probes {
    times: BTreeMap<HostId, AbortHandle>,
    address: Option<AbortHandle>,
    /// How often to check the egress address.
    address_every: Duration,
}

impl Probes {
    /// Starts nothing until [`Probes::follow`].
    pub(crate) fn new(address_every: Duration) -> Self {
        Self {
            times: BTreeMap::new(),
            address: None,
            address_every,
        }
    }

    /// Checks the egress address, and the time of the hosts of these rules and of no others.
    pub(crate) fn follow(&mut self, broker: &Arc<Broker>, policy: &Policy) {
        let host_ids = policy.hosts();
        if self.address.as_ref().is_none_or(AbortHandle::is_finished) {
            let probe = probes::watch_address(Arc::clone(broker), self.address_every);
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
                tokio::spawn(probes::watch_time(Arc::clone(broker), host_id)).abort_handle()
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
