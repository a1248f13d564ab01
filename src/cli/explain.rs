//! `credbroker explain`: what a code of KuCoin's means, in the words that bots get.

use clap::Args;
use serde_json::json;

use super::text::{Cell, Style, paragraph};
use super::{DONE, FAILED, say, scope, show};
use crate::kucoin::Scope;
use crate::kucoin::advice::{self, Advice, AdviceContext};

#[derive(Args, Debug)]
pub(super) struct Options {
    /// A code as KuCoin answers it, or a topic of the list. Without it all are listed.
    code: Option<String>,
    /// futures, spot-margin or unified, where a code means different things; without it all of them are shown.
    #[arg(long, value_parser = scope)]
    scope: Option<Scope>,
    /// Lists all topics with their codes.
    #[arg(long, conflicts_with = "code")]
    list: bool,
    /// Writes a JSON object a line, for machines.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(question: &Options) -> u8 {
    let &Options {
        ref code,
        scope,
        json,
        ..
    } = question;
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
            let told: Vec<_> = found.iter().map(|advice| explained(code, advice)).collect();
            told.join("\n")
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
    let mut said = paragraph(
        "",
        &match scope {
            Some(scope) => format!("There is no advice on {code} in scope {scope}."),
            None => format!("There is no advice on {code}."),
        },
    );
    said += &paragraph(
        "fix: ",
        match advice::of(None, code) {
            Some(_) => "Leave --scope out: other scopes have it.",
            None => {
                "Look it up in KuCoin's API documentation under Error Code; `msg` in the answer says what KuCoin itself has to say."
            }
        },
    );
    said.trim_end().to_owned()
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
        paragraph("  why: ", cause),
        paragraph("  fix: ", &fix),
    ]
    .concat()
}

/// Scopes in which `code` means this; of a topic, none.
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
