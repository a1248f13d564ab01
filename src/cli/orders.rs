//! `credbroker orders`: decisions of admins about clientOids.

use std::path::PathBuf;

use clap::Subcommand;

use super::admin::{self, ADMIN, Client};
use super::text::paragraph;
use super::{DECIDE_WITHIN, DONE, show};
use crate::proto::{AcceptGapRequest, AcceptGapResponse};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Accept that the audit log does not show all clientOids that were used.
    ///
    /// At its start, the broker reads from the audit log which clientOids were used. If lines are missing, it refuses
    /// risk-increasing requests with `AUDIT_UNAVAILABLE`, because it could place an order twice. Restore the rotated files
    /// of the audit log beside it and restart the broker instead, if you can. Otherwise look up every order whose outcome
    /// is unknown before you accept the gap. Exit code 0: done; 1: broker unreachable or call refused; 2: usage error
    /// or invalid admin.toml.
    AcceptGap {
        /// Path of admin.toml, which has the address of the broker.
        #[arg(long, default_value = ADMIN)]
        admin: PathBuf,
    },
}

pub(super) fn run(command: &Command) -> u8 {
    let Command::AcceptGap { admin: file } = command;
    admin::run(file, async |mut admin| {
        let accept = async |client: &mut Client, request| client.accept_gap(request).await;
        let response = admin
            .ask(DECIDE_WITHIN, AcceptGapRequest {}, accept)
            .await?;
        Ok(show(&accepted(response), DONE))
    })
}

fn accepted(response: AcceptGapResponse) -> String {
    if !response.was_refused {
        let what = "there is no gap: the broker knows which clientOids were used.";
        return paragraph("unchanged: ", what);
    }
    paragraph(
        "accepted: ",
        "risk-increasing requests are sent again. An order that was sent before now can be repeated if its audit line is missing.",
    )
}
