//! `credbroker bots`: blocks and unblocks bots.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::admin::{self, ADMIN, Client};
use super::text::{clean_lines, paragraph};
use super::{DECIDE_WITHIN, DONE, show};
use crate::proto::{BlockBotRequest, BlockBotResponse, UnblockBotRequest};

/// The bot to block or unblock.
#[derive(Args, Debug)]
pub(super) struct Which {
    /// Bot, as named in its certificate: `spiffe://<trust domain>/bot/<name>`, or a DNS name. The last part of the name is
    /// enough if no other bot in the rules has it.
    name: String,
    /// Path of admin.toml, which has the address of the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Block a bot: immediately refuse all its calls, including cancels and reads; the block survives restarts.
    ///
    /// Exit code 0: blocked; 1: broker unreachable, call refused, or not written to disk; 2: usage error or invalid
    /// admin.toml.
    #[command(after_long_help = "Example:\n  credbroker bots block spiffe://example.org/bot/maker")]
    Block(Which),
    /// Unblock a bot; its grants in the rules apply again.
    ///
    /// Exit code 0: done; 1: broker unreachable or call refused; 2: usage error or invalid admin.toml.
    #[command(
        after_long_help = "Example:\n  credbroker bots unblock spiffe://example.org/bot/maker"
    )]
    Unblock(Which),
}

pub(super) fn run(command: &Command) -> u8 {
    let (Command::Block(which) | Command::Unblock(which)) = command;
    let name = &which.name;
    admin::run(&which.admin, async |mut admin| {
        let text = match command {
            Command::Block(_) => {
                let request = BlockBotRequest { bot: name.clone() };
                let block = async |client: &mut Client, request| client.block_bot(request).await;
                let response = admin.ask(DECIDE_WITHIN, request, block).await?;
                blocked(&response)
            }
            Command::Unblock(_) => {
                let request = UnblockBotRequest { bot: name.clone() };
                let unblock =
                    async |client: &mut Client, request| client.unblock_bot(request).await;
                let response = admin.ask(DECIDE_WITHIN, request, unblock).await?;
                unblocked(&response.bot, response.was_blocked)
            }
        };
        Ok(show(&clean_lines(&text), DONE))
    })
}

fn blocked(response: &BlockBotResponse) -> String {
    let name = &response.bot;
    let already = if response.was_blocked {
        " (was already blocked)"
    } else {
        ""
    };
    let mut text = paragraph(
        "blocked: ",
        &format!(
            "{name}{already}. All its calls are refused (CALLER_BLOCKED); the block survives restarts. Requests already sent run to completion."
        ),
    );
    if !response.is_in_rules {
        let but = "no rule names this bot; check the name, which must match the bot's certificate exactly. The audit log (field \
                   `bot`) and the grants in the rules show the names in use.";
        text += &paragraph("but: ", but);
    }
    text += &paragraph(
        "next: ",
        "its orders stay open, and it can no longer cancel them; run `credbroker halt ACCOUNT --cancel-all`, or cancel them with \
         another bot. If its certificate was stolen, also remove its grants from the rules",
    );
    text + &paragraph("undo: ", &format!("credbroker bots unblock {name}"))
}

fn unblocked(name: &str, was_blocked: bool) -> String {
    if was_blocked {
        let detail = format!("{name}. Its grants in the rules apply again.");
        paragraph("unblocked: ", &detail)
    } else {
        let detail =
            format!("{name} was not blocked. The name must match the bot's certificate exactly.");
        paragraph("unchanged: ", &detail)
    }
}
