//! Tells the firewall which addresses of the exchange the broker uses: the broker itself may not change the firewall's rules.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::IpAddr;
use std::path::PathBuf;

use tokio::task::spawn_blocking;
use tokio::time::sleep;

use super::{Egress, MAINTAIN_EVERY};
use crate::base::state_file;

/// The file in the state folder: one address per line, sorted.
pub(crate) const FILE: &str = "exchange-addresses";

impl Egress {
    /// Keeps [`FILE`] up to date. It is written whole, and only if an address is new or gone.
    pub(crate) async fn write_addresses(&self, state_dir: PathBuf) {
        let mut written = BTreeSet::new();
        self.first_lookups().await;
        loop {
            let found = self.addresses();
            if found != written && !found.is_empty() {
                let (folder, text) = (state_dir.clone(), lines(&found));
                let write = move || state_file::replace(&folder, FILE, text.as_bytes());
                match spawn_blocking(write).await {
                    Ok(Ok(())) => written = found,
                    Ok(Err(error)) => {
                        tracing::warn!(file.path = FILE, exception.message = %error, "cannot write the exchange's addresses; the firewall keeps the old ones");
                    }
                    Err(_) => return,
                }
            }
            sleep(MAINTAIN_EVERY).await;
        }
    }

    /// The addresses of all hosts that lookups have found.
    fn addresses(&self) -> BTreeSet<IpAddr> {
        let all = self.destinations.values();
        all.flat_map(|destination| destination.addresses())
            .map(|address| address.ip())
            .collect()
    }
}

fn lines(addresses: &BTreeSet<IpAddr>) -> String {
    addresses.iter().fold(String::new(), |mut text, address| {
        let _ = writeln!(text, "{address}");
        text
    })
}
