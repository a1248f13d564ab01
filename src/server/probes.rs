//! Which hosts are asked for their time: those that the rules' accounts sign for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::broker::{Broker, probes};
use crate::clock::HostId;
use crate::policy::Policy;

/// The running questions; they end when this drops.
pub(crate) struct Probes {
    times: BTreeMap<HostId, AbortHandle>,
    address: Option<AbortHandle>,
    /// How often to ask for the address.
    address_every: Duration,
}

impl Probes {
    /// Nothing is asked until [`Probes::follow`].
    pub(crate) fn new(address_every: Duration) -> Self {
        Self {
            times: BTreeMap::new(),
            address: None,
            address_every,
        }
    }

    /// Asks from which address requests come, and the hosts of these rules, and no other, for their time.
    pub(crate) fn follow(&mut self, broker: &Arc<Broker>, policy: &Policy) {
        let host_ids = policy.hosts();
        if self.address.as_ref().is_none_or(AbortHandle::is_finished) {
            let asking = probes::watch_address(Arc::clone(broker), self.address_every);
            self.address = Some(tokio::spawn(asking).abort_handle());
        }
        self.times.retain(|host_id, task| {
            // One that a defect has ended is started again.
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
