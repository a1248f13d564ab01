//! TLS handshakes under way: bounded, and shared out fairly among those who may be anybody.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

/// TLS handshakes at once. One more ends the oldest of the address that has the most: a handshake that goes on takes
/// milliseconds, and whoever opens connections and says nothing does not keep others out.
const HANDSHAKES: usize = 512;

/// Handshakes under way, by the order in which they began.
#[derive(Default)]
pub(super) struct Handshakes(Mutex<UnderWay>);

#[derive(Default)]
struct UnderWay {
    begun: u64,
    peers: BTreeMap<u64, (IpAddr, CancellationToken)>,
}

/// One of them; it is over when this drops.
pub(super) struct Handshake {
    handshakes: Arc<Handshakes>,
    number: u64,
    /// Cancelled when it must make room.
    pub(super) is_given_up: CancellationToken,
}

impl Handshakes {
    /// Takes one in; makes room for it where there is none.
    pub(super) fn begin(handshakes: &Arc<Self>, peer: IpAddr) -> Handshake {
        let mut under_way = handshakes.under_way();
        if under_way.peers.len() >= HANDSHAKES {
            under_way.give_one_up();
        }
        under_way.begun += 1;
        let (number, is_given_up) = (under_way.begun, CancellationToken::new());
        under_way
            .peers
            .insert(number, (network(peer), is_given_up.clone()));
        Handshake {
            handshakes: Arc::clone(handshakes),
            number,
            is_given_up,
        }
    }

    fn under_way(&self) -> std::sync::MutexGuard<'_, UnderWay> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one peer can have for itself: an IPv4 address, or a /64 of IPv6.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64)).into(),
    }
}

impl UnderWay {
    /// Ends the oldest of the address that has the most.
    fn give_one_up(&mut self) {
        let mut counts: HashMap<IpAddr, usize> = HashMap::new();
        for (peer, _) in self.peers.values() {
            *counts.entry(*peer).or_default() += 1;
        }
        let most = counts.values().max().copied().unwrap_or_default();
        let oldest = self
            .peers
            .iter()
            .find(|(_, (peer, _))| counts.get(peer) == Some(&most));
        if let Some((_, is_given_up)) = oldest
            .map(|(number, _)| *number)
            .and_then(|number| self.peers.remove(&number))
        {
            is_given_up.cancel();
        }
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.handshakes.under_way().peers.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_ends_the_oldest_of_the_address_that_has_the_most() {
        let handshakes = Arc::<Handshakes>::default();
        let begin = |peer: &str| Handshakes::begin(&handshakes, peer.parse().unwrap());
        let bot = begin("192.0.2.1");
        let silent: Vec<_> = (1..HANDSHAKES).map(|_| begin("192.0.2.2")).collect();
        let gone = |silent: &[Handshake]| {
            silent
                .iter()
                .filter(|one| one.is_given_up.is_cancelled())
                .count()
        };
        assert_eq!(gone(&silent), 0);
        let other = begin("192.0.2.3");
        assert!(silent[0].is_given_up.is_cancelled());
        assert_eq!(gone(&silent), 1);
        assert!(!bot.is_given_up.is_cancelled() && !other.is_given_up.is_cancelled());
        drop((bot, other, silent));
        assert!(handshakes.under_way().peers.is_empty());
    }

    #[test]
    fn where_every_address_has_one_the_oldest_of_all_ends() {
        let handshakes = Arc::<Handshakes>::default();
        let begin = |number: usize| {
            let address = Ipv6Addr::from_bits(((number + 1) as u128) << 64);
            Handshakes::begin(&handshakes, address.into())
        };
        let all: Vec<_> = (0..HANDSHAKES + 3).map(begin).collect();
        for (number, one) in all.iter().enumerate() {
            assert_eq!(one.is_given_up.is_cancelled(), number < 3, "{number}");
        }
        // Addresses of one network are one peer.
        assert_eq!(
            network("2001:db8::1".parse().unwrap()),
            network("2001:db8::2".parse().unwrap())
        );
    }
}
