//! `credbroker doctor --live`: each question that the broker depends on, what was expected and what came.
//!
//! Made to be pasted into a report: it tells of codes, messages, names and kinds of fields, and of no value. Nothing is
//! ordered: orders go to the exchange's endpoints for tests, where a scope has one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use super::super::text::{Level, Style, paragraph};
use super::super::{DONE, FAILED, USAGE, say, show};
use super::{ASK_WITHIN, Line, exchange, files, harmless, report, vault};
use crate::broker::Broker;
use crate::broker::trial::{Ask, info_of, order_of, read_of};
use crate::clock::{Clock, Place};
use crate::config::Config;
use crate::ids::{AccountId, Who};
use crate::kucoin::key_info;
use crate::kucoin::question::Question;
use crate::kucoin::shape::{Difference, Documented, documented};
use crate::kucoin::{Host, Method, Scope, code};
use crate::outcome::{Outcome, Reason};
use crate::server::assembly;
use crate::telemetry::chain;
use crate::text::clean_json;

use super::keys::Found;

/// For one question without a key.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

/// Words of a message that are at least so long, and hold a digit, could be ids of keys or orders.
const LONG_WORD: usize = 14;

/// What was expected of one question, and what came.
struct Compared {
    question: String,
    level: Level,
    expected: String,
    came: String,
    missing: Vec<&'static str>,
    new: Vec<String>,
    fix: Option<String>,
}

pub(super) async fn run(config: &Config, account: &AccountId, json: bool) -> u8 {
    match ask(config, account).await {
        Ok(compared) => {
            let has_failed = compared.iter().any(|one| one.level == Level::Failed);
            let text = if json {
                compared
                    .iter()
                    .fold(String::new(), |text, one| text + &one.json() + "\n")
            } else {
                let style = Style::of_stdout();
                let head = format!(
                    "credbroker {}, doctor --live {account}\n",
                    env!("CARGO_PKG_VERSION")
                );
                compared
                    .iter()
                    .fold(head, |text, one| text + &one.text(style))
            };
            show(&text, if has_failed { FAILED } else { DONE })
        }
        Err(Unasked::Account) => {
            say(&format!(
                "{} names no account {account}\nfix: name one of its accounts, or correct `rules` in the configuration",
                config.rules.display()
            ));
            USAGE
        }
        Err(Unasked::Lines(lines)) => report(&lines, json, FAILED),
    }
}

/// Why nothing was asked.
enum Unasked {
    Account,
    Lines(Vec<Line>),
}

async fn ask(config: &Config, account: &AccountId) -> Result<Vec<Compared>, Unasked> {
    let (lines, policy) = files::rules(&config.rules);
    let policy = policy.ok_or(Unasked::Lines(lines))?;
    let of_account = policy.accounts().find(|entry| entry.id == *account);
    let of_account = Arc::clone(of_account.ok_or(Unasked::Account)?);
    let (lines, recordable) = files::audit(config);
    recordable.map_err(|_| Unasked::Lines(lines))?;
    let provider = assembly::provider();
    let (egress_roots, egress_lines) = files::roots("egress.roots", &config.egress_roots);
    let (vault_roots, vault_lines) = files::roots("vault.roots", &config.vault_roots);
    let lines = egress_lines.into_iter().chain(vault_lines);
    let failed: Vec<_> = lines.filter(|line| line.level == Level::Failed).collect();
    if !failed.is_empty() {
        return Err(Unasked::Lines(failed));
    }
    let egress = assembly::egress(config, egress_roots, &provider);
    let egress = egress.map_err(|error| Unasked::Lines(vec![exchange::unfit(&error)]))?;
    let clock = Arc::new(Clock::system());

    let site = of_account.site;
    let mut places: BTreeSet<Place> = of_account
        .keys
        .keys()
        .map(|scope| (site, scope.host()))
        .collect();
    places.insert((site, Host::Spot));
    let (_, is_running) = files::state(config);
    let look = vault::look(config, vault_roots, &provider, Some(&policy), is_running);
    let look = async {
        let found = timeout(ASK_WITHIN, look).await;
        found.unwrap_or_else(|_| vault::late(ASK_WITHIN))
    };
    let (lines, (vault_lines, found)) =
        tokio::join!(exchange::look(config, &egress, &clock, &places), look);
    let is_bad = |line: &Line| line.level == Level::Failed;
    let hosts: Vec<_> = lines
        .into_iter()
        .filter(|line| line.check == "host" && is_bad(line))
        .collect();
    if !hosts.is_empty() {
        return Err(Unasked::Lines(hosts));
    }
    let found: BTreeMap<_, _> = found
        .into_iter()
        .filter(|found| found.account == *account)
        .map(|found| (found.name.clone(), found))
        .collect();
    if found.is_empty() {
        return Err(Unasked::Lines(vault_lines));
    }
    let broker = assembly::broker(config, policy, egress, clock).map_err(|error| {
        let fix = "`credbroker doctor` says what is wrong with it";
        Unasked::Lines(vec![Line::failed("state", "", chain(&error), fix)])
    })?;
    let broker = Arc::new(broker);

    let public = places.iter().map(|place| (*place, Question::Time));
    let public = public.chain([((site, Host::Spot), Question::MyIp)]);
    let public = public.map(|(place, question)| unsigned(&broker, place, question));
    let mut compared = futures_util::future::join_all(public).await;
    let mut questions = Vec::new();
    for (name, found) in &found {
        let scopes: BTreeSet<_> = of_account
            .keys
            .iter()
            .filter(|(_, named)| *named == name)
            .map(|(scope, _)| *scope)
            .collect();
        let (scope, info) = info_of(&scopes);
        questions.push((found, scope, info));
        for scope in scopes {
            questions.push((found, scope, read_of(scope)));
            questions.extend(order_of(scope).map(|order| (found, scope, order)));
        }
    }
    let signed = questions
        .into_iter()
        .map(|(found, scope, ask)| signed(&broker, found, scope, ask));
    compared.extend(futures_util::future::join_all(signed).await);
    broker.audit.sync();
    Ok(compared)
}

/// A question that needs no key.
async fn unsigned(broker: &Broker, place: Place, question: Question) -> Compared {
    let path = match question {
        Question::MyIp => "/api/v1/my-ip",
        Question::Time => "/api/v1/timestamp",
    };
    let asked = async {
        let connection = broker.egress.connect(place, true).await;
        let connection = connection.map_err(|error| chain(&error))?;
        let answer = broker.egress.ask(connection, question).await;
        answer.map_err(|error| chain(&error))
    };
    let late = || Err(format!("no answer within {} s", ANSWER_WITHIN.as_secs()));
    let answer = timeout(ANSWER_WITHIN, asked)
        .await
        .unwrap_or_else(|_| late());
    let name = format!("GET {path} ({} host, unsigned)", place.1.as_str());
    let documented = documented(Method::Get, path);
    match answer {
        Ok(answer) => {
            let envelope: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
            let text = |name: &str| {
                envelope
                    .get(name)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
            };
            let came = Came {
                http_status: answer.status().as_u16(),
                code: text("code"),
                msg: text("msg"),
                body: answer.body(),
            };
            came.compare(name, documented)
        }
        Err(reason) => unanswered(name, documented, &reason),
    }
}

/// A question with a key: recorded, signed and sent like a bot's request.
async fn signed(broker: &Arc<Broker>, found: &Found, scope: Scope, ask: Ask) -> Compared {
    let (method, path) = (ask.method, ask.path);
    let name = format!("{method} {path} ({scope}, key {})", found.name);
    let documented = documented(method, path);
    let key = Some(Arc::clone(&found.key));
    let asked = broker.ask_as(Who::Broker, &found.account, scope, ask, key);
    match asked.await {
        Ok(receipt) => {
            let answer = &receipt.answer;
            let came = Came {
                http_status: answer.http_status.as_u16(),
                code: &answer.code,
                msg: &answer.msg,
                body: &answer.body,
            };
            let mut compared = came.compare(name, documented);
            if answer.outcome == Outcome::Rejected {
                let expected = broker.proof.expected();
                let finding = key_info::refusal(&answer.code, &answer.msg, scope, expected);
                compared.fix = Some(harmless(&format!("{} {}", finding.cause, finding.fix)));
            }
            compared
        }
        Err(error) => {
            let reason = match error.reason() {
                Reason::AnswerLost => error.of_repeatable_request(),
                _ => chain(&error),
            };
            unanswered(name, documented, &reason)
        }
    }
}

fn expected(documented: Option<Documented>) -> String {
    let data = documented.map_or("anything", Documented::kind);
    format!("HTTP 200, code 200000, data: {data}")
}

fn unanswered(question: String, documented: Option<Documented>, reason: &str) -> Compared {
    Compared {
        question,
        level: Level::Failed,
        expected: expected(documented),
        came: shown(reason),
        missing: Vec::new(),
        new: Vec::new(),
        fix: Some("`credbroker doctor` looks at the way to the exchange".to_owned()),
    }
}

/// A whole answer.
struct Came<'a> {
    http_status: u16,
    code: &'a str,
    msg: &'a str,
    body: &'a [u8],
}

impl Came<'_> {
    fn compare(&self, question: String, documented: Option<Documented>) -> Compared {
        let Difference { kind, missing, new } = documented
            .map(|documented| documented.compare(self.body))
            .unwrap_or_default();
        let (http_status, code) = (self.http_status, shown(self.code));
        let mut came = format!("HTTP {http_status}, code {code}, data: {kind}");
        if !self.msg.is_empty() {
            came = format!("{came}, msg: {}", shown(self.msg));
        }
        let is_taken = http_status == 200 && self.code == code::SUCCESS;
        let is_of_kind = documented.is_none_or(|documented| documented.kind() == kind);
        let level = if !is_taken || !is_of_kind {
            Level::Failed
        } else if missing.is_empty() && new.is_empty() {
            Level::Ok
        } else {
            Level::Warning
        };
        if level == Level::Ok {
            came += ", as documented";
        }
        Compared {
            question,
            level,
            expected: expected(documented),
            came,
            // What was refused has no data to compare.
            missing: if is_taken { missing } else { Vec::new() },
            new: if is_taken { new } else { Vec::new() },
            fix: None,
        }
    }
}

/// What a stranger wrote, without what could be the id of a key or an order, and not too much of it.
fn shown(text: &str) -> String {
    let is_id = |word: &&str| word.len() >= LONG_WORD && word.bytes().any(|b| b.is_ascii_digit());
    let words = text.split_inclusive(|c: char| !c.is_ascii_alphanumeric());
    let words = words.map(|word| {
        let bare = word.trim_end_matches(|c: char| !c.is_ascii_alphanumeric());
        if is_id(&bare) {
            word.replace(bare, "***")
        } else {
            word.to_owned()
        }
    });
    harmless(&words.collect::<String>())
        .chars()
        .take(200)
        .collect()
}

impl Compared {
    fn text(&self, style: Style) -> String {
        let word = self.level.as_str();
        let pad = " ".repeat(9 - word.len());
        let mut text = format!(
            "{}{pad}{}\n",
            style.coloured(self.level, word),
            self.question
        );
        text += &paragraph("         expected  ", &self.expected);
        text += &paragraph("         came      ", &self.came);
        if !self.missing.is_empty() {
            text += &paragraph("         missing   ", &self.missing.join(", "));
        }
        if !self.new.is_empty() {
            text += &paragraph("         new       ", &self.new.join(", "));
        }
        if let Some(fix) = &self.fix {
            text += &paragraph("         fix: ", fix);
        }
        text
    }

    fn json(&self) -> String {
        let object = json!({
            "check": format!("live {}", self.question),
            "status": self.level.as_str(),
            "detail": format!("expected {}; came {}", self.expected, self.came),
            "fix": self.fix,
            "missing": self.missing,
            "new": self.new,
        });
        clean_json(&object.to_string()).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_be_an_id_is_not_shown() {
        for (text, expected) in [
            (
                "Order 6596b9b5b7b1c50001b0c4d7 not found.",
                "Order *** not found.",
            ),
            (
                "KC-API-KEY:simulated000000000001001, no",
                "KC-API-KEY:***, no",
            ),
            ("current ip: 203.0.113.9", "current ip: 203.0.113.9"),
            ("Internationalization", "Internationalization"),
        ] {
            assert_eq!(shown(text), expected);
        }
    }
}
