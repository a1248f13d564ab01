//! Tells the process that started the broker, such as systemd with `Type=notify`, how far it is: `sd_notify(3)`. Without
//! `NOTIFY_SOCKET` in the environment, nothing is sent.

use std::io;

use sd_notify::NotifyState;
use tokio::sync::watch;
use tokio::time::sleep;

use crate::ops::health::Readiness;

/// The listeners are open, and the broker runs. Whether it can send orders is another question, which `/readyz` answers.
pub(super) fn ready() {
    notify(NotifyState::Ready);
}

/// A stop has begun.
pub(super) fn stopping() {
    notify(NotifyState::Stopping);
}

/// Feeds the watchdog for as long as the broker works: after each round of the health reporter, which asks every part of the
/// broker for its state, but not more often than needed. Ends at once if there is no watchdog, and with the reporter.
pub(super) async fn feed_watchdog(mut rounds: watch::Receiver<Readiness>) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return;
    };
    while rounds.changed().await.is_ok() {
        notify(NotifyState::Watchdog);
        // The health reporter reports every second; systemd advises half the limit.
        sleep(limit / 4).await;
    }
}

fn notify(state: NotifyState<'_>) {
    let sent: io::Result<()> = sd_notify::notify(&[state]);
    if let Err(error) = sent {
        tracing::warn!(exception.message = %error, "cannot notify the supervisor at NOTIFY_SOCKET; it may consider the broker failed");
    }
}
