//! `credbroker bots`: keeps a bot out, whatever the rules grant it.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::admin::{self, ADMIN, Client};
use super::text::{clean_lines, paragraph};
use super::{DECIDE_WITHIN, DONE, show};
use crate::proto::{BlockBotRequest, BlockBotResponse, UnblockBotRequest};

/// Which bot.
#[derive(Args, Debug)]
pub(super) struct Which {
    /// The bot, as its certificate names it: `spiffe://<trust domain>/bot/<name>`, or a DNS name. The end of the name will
    /// do where the rules name one such bot alone.
    name: String,
    /// How to reach the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Refuses every call of a bot, cancels and reads too, at once and also after a restart of the broker.
    ///
    /// Exit code 0: done; 1: the broker was not reached, or refused, or it is not on disk; 2: usage or admin.toml.
    #[command(after_long_help = "Example:\n  credbroker bots block spiffe://example.org/bot/maker")]
    Block(Which),
    /// Lets a blocked bot call again; the rules say what it may.
    ///
    /// Exit code 0: done; 1: the broker was not reached, or refused; 2: usage or admin.toml.
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
    let since = if response.was_blocked {
        "already in force"
    } else {
        "in force now"
    };
    let mut text = paragraph(
        "blocked: ",
        &format!(
            "{name}, {since}. Each of its calls is refused (CALLER_BLOCKED); survives restarts. Calls already sent run to their end."
        ),
    );
    if !response.is_in_rules {
        let but = "the rules name no such bot, so look whether the name is right: it is compared whole, as certificates have it. \
                   The `bot` lines of the audit file and the grants in the rules show names.";
        text += &paragraph("but: ", but);
    }
    text += &paragraph(
        "next: ",
        "its orders stay open, and it can no longer cancel them: use `credbroker halt ACCOUNT --cancel-all` or another bot. If its \
         certificate has been stolen, take its grants out of the rules too",
    );
    text + &paragraph("undo: ", &format!("credbroker bots unblock {name}"))
}

fn unblocked(name: &str, was_blocked: bool) -> String {
    if was_blocked {
        let what = format!("{name}, in force now. The rules decide again what it may do.");
        paragraph("unblocked: ", &what)
    } else {
        let what =
            format!("{name} was not blocked. Names are compared whole, as certificates have them.");
        paragraph("unchanged: ", &what)
    }
}
