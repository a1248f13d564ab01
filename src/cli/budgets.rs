//! `credbroker budgets`: rate limits at the exchange, as the running broker counts them.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::admin::{self, ADMIN, Client};
use super::text::{Style, paragraph};
use super::{DECIDE_WITHIN, DONE, show};
use crate::proto::{AccountBudget, ListBudgetsRequest, ListBudgetsResponse, PoolBudget};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// Account, as named in the rules; without it, all accounts.
    account: Option<String>,
    /// Print one JSON object per line.
    #[arg(long)]
    json: bool,
    /// Path of admin.toml, which has the address of the broker.
    #[arg(long, default_value = ADMIN)]
    admin: PathBuf,
}

pub(super) fn run(options: &Options) -> u8 {
    admin::run(&options.admin, async |mut admin| {
        let request = ListBudgetsRequest {
            account: options.account.clone().unwrap_or_default(),
        };
        let list = async |client: &mut Client, request| client.list_budgets(request).await;
        let listed = admin.ask(DECIDE_WITHIN, request, list).await?;
        let text = if options.json {
            in_json(&listed)
        } else {
            table(Style::of_stdout(), &listed)
        };
        Ok(show(&text, DONE))
    })
}

fn in_json(listed: &ListBudgetsResponse) -> String {
    let lines = listed.budgets.iter().map(|budget| {
        let pool = pool(budget);
        let object = json!({
            "account": budget.account,
            "pool": pool.pool,
            "limit": pool.limit,
            "sent": budget.sent,
            "remaining": pool.remaining,
            "reset_ms": pool.reset_ms,
            "waiting": budget.waiting,
        });
        object.to_string() + "\n"
    });
    lines.collect()
}

fn table(style: Style, listed: &ListBudgetsResponse) -> String {
    let mut text = String::new();
    if listed.edge_blocked_ms > 0 {
        let seconds = listed.edge_blocked_ms.div_ceil(1000);
        text += &paragraph(
            "",
            &format!(
                "KuCoin blocks the egress address for {seconds} s more, because it got too many requests. Until then one cancel per second is sent, and nothing else."
            ),
        );
        text += "\n";
    }
    if listed.edge_limit > 0 {
        let limit = listed.edge_limit;
        let line = format!("At most {limit} requests per 10 s over all accounts.");
        text = text + &line + "\n\n";
    }
    if listed.budgets.is_empty() {
        return text + "No requests to rate-limited pools yet.\n";
    }
    let heads = [
        "account",
        "pool",
        "limit",
        "sent",
        "by others",
        "left",
        "waiting",
        "reset",
    ];
    let mut rows = vec![heads.map(Into::into).to_vec()];
    for budget in &listed.budgets {
        let pool = pool(budget);
        let by_others = pool.limit.saturating_sub(pool.remaining + budget.sent);
        let reset = match pool.reset_ms {
            0 => "-".to_owned(),
            ms => format!("{} s", ms.div_ceil(1000)),
        };
        rows.push(vec![
            budget.account.as_str().into(),
            pool.pool.as_str().into(),
            pool.limit.to_string().into(),
            budget.sent.to_string().into(),
            by_others.to_string().into(),
            pool.remaining.to_string().into(),
            budget.waiting.to_string().into(),
            reset.into(),
        ]);
    }
    text + &style.table(&rows)
}

fn pool(budget: &AccountBudget) -> PoolBudget {
    budget.pool.clone().unwrap_or_default()
}
