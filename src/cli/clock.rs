//! `credbroker clock`: accepts a large difference between the exchange's clock and the system clock.

use std::path::PathBuf;

use clap::Subcommand;

use super::admin::{self, ADMIN, Client};
use super::text::paragraph;
use super::{DECIDE_WITHIN, DONE, printable, show};
use crate::clock::difference;
use crate::proto::{AcceptClockRequest, AcceptClockResponse};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Accept that the exchange's clock and the broker's system clock are more than a day apart.
    ///
    /// While the difference is not accepted, risk-increasing requests are refused with `CLOCK_UNCERTAIN`. An accepted
    /// difference may change by up to 24 hours; the acceptance ends when the broker restarts. Compare both clocks with a
    /// third one first: if the system clock is wrong, set it instead. Exit code 0: done; 1: broker unreachable or
    /// call refused; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Examples:\n  credbroker clock accept global/spot\n  credbroker clock accept futures"
    )]
    Accept {
        /// Host, as shown in /readyz: SITE/HOST, or only HOST (spot or futures) if the rules use it on only one site.
        host: String,
        /// Path of admin.toml, which has the address of the broker.
        #[arg(long, default_value = ADMIN)]
        admin: PathBuf,
    },
}

pub(super) fn run(command: &Command) -> u8 {
    let Command::Accept { host, admin: file } = command;
    admin::run(file, async |mut admin| {
        let request = AcceptClockRequest { host: host.clone() };
        let accept = async |client: &mut Client, request| client.accept_clock(request).await;
        let response = admin.ask(DECIDE_WITHIN, request, accept).await?;
        Ok(show(&accepted(&response), DONE))
    })
}

fn accepted(response: &AcceptClockResponse) -> String {
    let AcceptClockResponse {
        host,
        difference_ms,
        was_refused,
    } = response;
    let (host, apart) = (printable(host), difference(*difference_ms));
    if !was_refused {
        let what = format!(
            "the clock of {host} is {apart}; this difference is at most 24 hours, or was already accepted."
        );
        return paragraph("unchanged: ", &what);
    }
    let what = format!(
        "the clock of {host} is {apart}. Risk-increasing requests are accepted again, and signed with the exchange's time."
    );
    let until = "the broker restarts, or the difference changes by more than 24 hours.";
    paragraph("accepted: ", &what) + &paragraph("until: ", until)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepted_difference_is_printed_with_its_end() {
        let response = |was_refused| AcceptClockResponse {
            host: "global/spot".to_owned(),
            difference_ms: 3650 * 24 * 60 * 60 * 1000,
            was_refused,
        };
        assert_eq!(
            accepted(&response(true)),
            "accepted: the clock of global/spot is 3650 days ahead of the system clock.\n          Risk-increasing requests are \
             accepted again, and signed with the\n          exchange's time.\nuntil: the broker restarts, or the difference changes by \
             more than 24 hours.\n"
        );
        let unchanged = accepted(&response(false));
        assert!(unchanged.starts_with("unchanged: "), "{unchanged}");
    }
}
