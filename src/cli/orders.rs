//! `credbroker orders`: decisions of admins about clientOids.

use std::path::PathBuf;

use clap::Subcommand;

use super::admin::{self, ADMIN, Client};
use super::text::paragraph;
use super::{DECIDE_WITHIN, DONE, printable, show};
use crate::proto::{AcceptGapRequest, AcceptGapResponse, Scope, SettleOrderRequest};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Accept that the audit log does not show all clientOids that were used.
    ///
    /// At its start, the broker reads from the audit log which clientOids were used. If lines are missing, it refuses
    /// risk-increasing requests with `AUDIT_UNAVAILABLE`, because it could place an order twice. Restore the rotated files
    /// of the audit log beside it and restart the broker instead, if you can. Otherwise make sure first that no bot still
    /// sends an order again that it sent before: the broker would place it a second time. Exit code 0: done; 1: broker unreachable or call refused; 2: usage error
    /// or invalid admin.toml.
    AcceptGap {
        /// Path of admin.toml, which has the address of the broker.
        #[arg(long, default_value = ADMIN)]
        admin: PathBuf,
    },
    /// Free the clientOid of an order that was not placed.
    ///
    /// For an order whose outcome the broker could not find out (`order_outcome` is `unknown`). Look it up at
    /// KuCoin first, also among filled and cancelled orders, at least 10 s after the deadline of its call; the broker does not
    /// check this. If it is there, do nothing: its clientOid stays used. Exit code 0: done; 1: broker unreachable or call refused; 2: usage error or invalid admin.toml.
    #[command(after_long_help = "Example:\n  credbroker orders settle main my-order-1 --absent")]
    Settle {
        /// Account, as named in the rules.
        account: String,
        /// The order's clientOid.
        client_oid: String,
        /// The order does not exist at KuCoin: it is not open, filled or cancelled.
        #[arg(long, required = true)]
        absent: bool,
        /// Scope of the order; needed only if orders of several scopes have this clientOid.
        #[arg(long, value_parser = ["spot-margin", "futures", "unified"])]
        scope: Option<String>,
        /// Path of admin.toml, which has the address of the broker.
        #[arg(long, default_value = ADMIN)]
        admin: PathBuf,
    },
}

pub(super) fn run(command: &Command) -> u8 {
    match command {
        Command::AcceptGap { admin: file } => admin::run(file, async |mut admin| {
            let accept = async |client: &mut Client, request| client.accept_gap(request).await;
            let response = admin
                .ask(DECIDE_WITHIN, AcceptGapRequest {}, accept)
                .await?;
            Ok(show(&accepted(response), DONE))
        }),
        Command::Settle {
            account,
            client_oid,
            absent,
            scope,
            admin: file,
        } => admin::run(file, async |mut admin| {
            let scope = match scope.as_deref() {
                Some("futures") => Scope::Futures,
                Some("spot-margin") => Scope::SpotMargin,
                Some("unified") => Scope::Unified,
                _ => Scope::Unspecified,
            };
            let request = SettleOrderRequest {
                account: account.clone(),
                client_oid: client_oid.clone(),
                scope: scope.into(),
                absent: *absent,
            };
            let settle = async |client: &mut Client, request| client.settle_order(request).await;
            admin.ask(DECIDE_WITHIN, request, settle).await?;
            let what = format!(
                "clientOid {} is free: the broker sends a new order with it.",
                printable(client_oid)
            );
            Ok(show(&paragraph("settled: ", &what), DONE))
        }),
    }
}

fn accepted(response: AcceptGapResponse) -> String {
    if !response.was_refused {
        let what = "there is no gap: the broker knows which clientOids were used.";
        return paragraph("unchanged: ", what);
    }
    paragraph(
        "accepted: ",
        "risk-increasing requests are sent again. If a bot repeats an order whose audit line is missing, the broker sends it a second time.",
    )
}
