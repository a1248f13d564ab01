//! `credbroker explain`: the meaning of a KuCoin code, in the same sentences as for bots.

use clap::Args;
use serde_json::json;

use super::text::{Cell, Style, paragraph};
use super::{DONE, FAILED, say, scope, show};
use crate::kucoin::Scope;
use crate::kucoin::advice::{self, Advice, AdviceContext};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// KuCoin code, or a topic from the list; without it, all topics are listed.
    code: Option<String>,
    /// Scope: futures, spot-margin or unified. The same code can mean different things in different
    /// scopes; without --scope, all meanings are shown.
    #[arg(long, value_parser = scope)]
    scope: Option<Scope>,
    /// List all topics with their codes.
    #[arg(long, conflicts_with = "code")]
    list: bool,
    /// Print one JSON object per line.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> u8 {
    let &Options {
        ref code,
        scope,
        json,
        ..
    } = options;
    let found: Vec<_> = match code {
        Some(code) => advice::meanings(scope, code).collect(),
        None => advice::ALL
            .iter()
            .filter(|advice| is_of(advice, scope))
            .collect(),
    };
    let text = match code {
        Some(code) if found.is_empty() => {
            say(&unknown(code, scope));
            return FAILED;
        }
        _ if json => found.iter().map(|advice| as_json(advice)).collect(),
        Some(code) => {
            let texts: Vec<_> = found.iter().map(|advice| explained(code, advice)).collect();
            texts.join("\n")
        }
        None => {
            let rows: Vec<_> = found.iter().map(|advice| listed(advice, scope)).collect();
            Style::of_stdout().table(&rows)
        }
    };
    show(&text, DONE)
}

fn is_of(advice: &Advice, scope: Option<Scope>) -> bool {
    let Some(scope) = scope else { return true };
    advice.codes.is_empty()
        || advice
            .codes
            .iter()
            .any(|(scopes, _)| scopes.contains(&scope))
}

fn unknown(code: &str, scope: Option<Scope>) -> String {
    let mut text = paragraph(
        "",
        &match scope {
            Some(scope) => format!("No advice for {code} in scope {scope}."),
            None => format!("No advice for {code}."),
        },
    );
    text += &paragraph(
        "fix: ",
        match advice::of(None, code) {
            Some(_) => "Omit --scope: there is advice for other scopes.",
            None => {
                "Look it up in KuCoin's API documentation under Error Code, and read `msg` in KuCoin's response."
            }
        },
    );
    text.trim_end().to_owned()
}

fn explained(word: &str, advice: &Advice) -> String {
    let Advice {
        topic,
        meaning,
        cause,
        ..
    } = advice;
    let scopes: Vec<_> = scopes(advice, word)
        .iter()
        .map(|scope| scope.as_str())
        .collect();
    let title = match &scopes[..] {
        _ if word == *topic => (*topic).to_owned(),
        scopes if scopes.len() == Scope::ALL.len() => format!("{word}: {topic}"),
        scopes => format!("{word} ({}): {topic}", scopes.join(", ")),
    };
    let fix = advice.fix(&AdviceContext::default());
    [
        paragraph("", &title),
        paragraph("  ", meaning),
        paragraph("  cause: ", cause),
        paragraph("  fix: ", &fix),
    ]
    .concat()
}

/// Scopes in which `code` has this meaning; empty if `code` is a topic.
fn scopes(advice: &Advice, code: &str) -> Vec<Scope> {
    let with_code = advice
        .codes
        .iter()
        .filter(|(_, codes)| codes.contains(&code));
    with_code
        .flat_map(|(scopes, _)| scopes.iter().copied())
        .collect()
}

fn listed(advice: &Advice, scope: Option<Scope>) -> Vec<Cell> {
    let of_scope = |scopes: &[Scope]| scope.is_none_or(|scope| scopes.contains(&scope));
    let codes = advice.codes.iter().filter(|(scopes, _)| of_scope(scopes));
    let codes: Vec<_> = codes.flat_map(|(_, codes)| codes.iter().copied()).collect();
    vec![advice.topic.into(), codes.join(" ").into()]
}

fn as_json(advice: &Advice) -> String {
    let codes = advice.codes.iter().map(|(scopes, codes)| {
        let scopes: Vec<_> = scopes.iter().map(|scope| scope.as_str()).collect();
        json!({"scopes": scopes, "codes": codes})
    });
    let object = json!({
        "topic": advice.topic, "codes": codes.collect::<Vec<_>>(), "meaning": advice.meaning, "cause": advice.cause,
        "fix": advice.fix(&AdviceContext::default()),
    });
    format!("{object}\n")
}
