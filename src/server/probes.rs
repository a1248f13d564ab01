//! Which hosts are asked for their time: those that the rules' accounts sign for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;

use crate::broker::{Broker, probes};
use crate::clock::Place;
use crate::policy::Policy;

/// The running questions; they end when this drops.
#[derive(Default)]
pub(super) struct Probes {
    times: BTreeMap<Place, AbortHandle>,
    address: Option<AbortHandle>,
}

impl Probes {
    /// Starts to ask from which address requests come.
    pub(super) fn watch_address(&mut self, broker: &Arc<Broker>, every: Duration) {
        let task = tokio::spawn(probes::watch_address(Arc::clone(broker), every));
        self.address = Some(task.abort_handle());
    }

    /// Asks the hosts of these rules for their time, and no other.
    pub(super) fn follow(&mut self, broker: &Arc<Broker>, policy: &Policy) {
        let places = policy.places();
        self.times.retain(|place, task| {
            // One that a defect has ended is started again.
            let stays = !task.is_finished() && places.contains(place);
            if !stays {
                task.abort();
            }
            stays
        });
        for place in places {
            self.times.entry(place).or_insert_with(|| {
                tokio::spawn(probes::watch_time(Arc::clone(broker), place)).abort_handle()
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
