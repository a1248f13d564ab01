//! Whether the limit of open files (descriptors) allows the connections that `[limits]` allows. Pure.

use crate::broker::admission::AdmissionLimits;
use crate::process::Share;

/// What no setting limits: connections of admins and to Vault, the audit log, listeners, name lookups.
const OTHERS: u64 = 64;

/// A limit of open files that is too low for `[limits]`. Connections: how many it allows, and how many `[limits]` does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Shortage {
    descriptors: u64,
    /// The lowest limit that is enough.
    pub(crate) needed: u64,
    /// Of bots.
    pub(crate) bots: (u64, u64),
    /// To the exchange: one for each call in flight.
    pub(crate) exchange: (u64, u64),
}

impl Shortage {
    /// Compares `limits` with a process that may have `descriptors` files open; `None` if these are enough.
    pub(crate) fn find(limits: &AdmissionLimits, descriptors: u64) -> Option<Self> {
        let bots = limits.connections as u64;
        let exchange = (limits.calls + limits.cancels) as u64;
        let (of_bots, small) = (Share::Bots as u64, Share::Small as u64);
        // Handshakes of bots and of admins, and the ops listener.
        let rest = small - 3;
        let others = exchange + bots + OTHERS;
        let needed = (bots * of_bots).max((others * small).div_ceil(rest));
        if descriptors >= needed {
            return None;
        }
        let allowed_bots = bots.min(descriptors / of_bots);
        let left = descriptors / small * rest;
        let allowed = left.saturating_sub(allowed_bots + OTHERS).min(exchange);
        Some(Self {
            descriptors,
            needed,
            bots: (allowed_bots, bots),
            exchange: (allowed, exchange),
        })
    }

    /// What is wrong; continues a sentence that begins with the process.
    pub(crate) fn cause(&self) -> String {
        let Self {
            descriptors,
            bots,
            exchange,
            ..
        } = self;
        format!(
            "may have {descriptors} files open, which allows {} of {} connections of bots (limits.connections) and {} of {} connections \
             to the exchange (limits.calls_in_flight + limits.cancels_in_flight)",
            bots.0, bots.1, exchange.0, exchange.1
        )
    }

    /// How to correct it.
    pub(crate) fn fix(&self) -> String {
        let needed = self.needed;
        format!(
            "set LimitNOFILE={needed} (systemd) or --ulimit nofile={needed} (containers), or lower these limits"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(connections: usize, calls: usize) -> AdmissionLimits {
        AdmissionLimits {
            calls,
            calls_per_bot: 1,
            cancels: 0,
            cancels_per_bot: 1,
            message_bytes_per_bot: 1,
            answer_bytes: 1,
            answer_bytes_per_bot: 1,
            connections,
            connections_per_bot: 1,
        }
    }

    #[test]
    fn needed_descriptors_are_enough_and_one_less_is_not() {
        for (connections, calls) in [(8192, 1536), (100, 1536), (1, 1), (1_000_000, 200_000)] {
            let limits = limits(connections, calls);
            let found = Shortage::find(&limits, 0).unwrap();
            assert_eq!(Shortage::find(&limits, found.needed), None);
            let one_less = Shortage::find(&limits, found.needed - 1).unwrap();
            let is_short = |(allowed, wanted)| allowed < wanted;
            assert!(is_short(one_less.bots) || is_short(one_less.exchange));
        }
    }

    #[test]
    fn defaults_need_16384_descriptors() {
        let found = Shortage::find(&limits(8192, 1536), 1024).unwrap();
        assert_eq!(
            (found.needed, found.bots, found.exchange),
            (16_384, (512, 8192), (256, 1536))
        );
    }
}
