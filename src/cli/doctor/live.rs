//! `credbroker doctor --live`: for each kind of request that the broker depends on, the expected and the actual response.
//!
//! The output can be pasted into a report: it contains codes, messages, and names and types of fields, but no values. No
//! real order is placed: orders go to the exchange's test endpoint, if the scope has one. An order that does not exist is
//! looked up, because no documentation has the answer to that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use super::super::{FAILED, USAGE, say};
use super::{ASK_WITHIN, exchange, files, harmless, report, vault};
use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, Principal, RequestId};
use crate::base::outcome::{Outcome, Reason};
use crate::broker::Broker;
use crate::clock::{Clock, HostId};
use crate::config::Config;
use crate::kucoin::broker_query::BrokerQuery;
use crate::kucoin::key_info;
use crate::kucoin::lookup::{Lookup, LookupResult};
use crate::kucoin::schema::{Difference, Schema, schema};
use crate::kucoin::{Host, Method, Scope, code};
use crate::ops::key_test::{Ask, info_of, order_of, read_of};
use crate::server::build;
use crate::telemetry::chain;

use super::keys::FoundKey;

/// Limit for one unsigned request.
const ANSWER_WITHIN: Duration = Duration::from_secs(8);

const CHECK: &str = "live";

/// Words of a message that have at least this length and contain a digit could be ids of keys or orders.
const LONG_WORD: usize = 14;

pub(super) async fn run(config: &Config, account: &AccountId, json: bool) -> u8 {
    match check(config, account).await {
        Ok(lines) => {
            let version = env!("CARGO_PKG_VERSION");
            let head = format!("credbroker {version}, doctor --live {account}\n");
            report(&head, &lines, json, FAILED)
        }
        Err(CheckError::Account) => {
            say(&format!(
                "{} has no account {account}\nfix: use an account from this file, or correct `rules` in the configuration",
                config.rules.display()
            ));
            USAGE
        }
        Err(CheckError::Lines(lines)) => report("", &lines, json, FAILED),
    }
}

/// Why no request was sent.
enum CheckError {
    Account,
    Lines(Vec<Diagnosis>),
}

async fn check(config: &Config, account: &AccountId) -> Result<Vec<Diagnosis>, CheckError> {
    let (lines, policy) = files::rules(&config.rules);
    let policy = policy.ok_or(CheckError::Lines(lines))?;
    let of_account = policy.accounts().find(|entry| entry.id == *account);
    let of_account = Arc::clone(of_account.ok_or(CheckError::Account)?);
    let (lines, audit_ready) = files::audit(config);
    audit_ready.map_err(|_| CheckError::Lines(lines))?;
    let provider = build::provider();
    let (egress_roots, egress_lines) = files::roots("egress.roots", &config.egress_roots);
    let (vault_roots, vault_lines) = files::roots("vault.roots", &config.vault_roots);
    let lines = egress_lines.into_iter().chain(vault_lines);
    let failed: Vec<_> = lines.filter(Diagnosis::is_failed).collect();
    if !failed.is_empty() {
        return Err(CheckError::Lines(failed));
    }
    let egress = build::egress(config, egress_roots, &provider);
    let egress = egress.map_err(|error| CheckError::Lines(vec![exchange::setup_failed(&error)]))?;
    let clock = Arc::new(Clock::system());

    let site = of_account.site;
    let mut host_ids: BTreeSet<HostId> = of_account
        .keys
        .keys()
        .map(|scope| (site, scope.host()))
        .collect();
    host_ids.insert((site, Host::Spot));
    let is_running = files::is_running(config);
    let vault_checks = vault::check(config, vault_roots, &provider, Some(&policy), is_running);
    let vault_checks = async {
        let found = timeout(ASK_WITHIN, vault_checks).await;
        found.unwrap_or_else(|_| vault::timed_out(ASK_WITHIN))
    };
    let (lines, (vault_lines, found)) = tokio::join!(
        exchange::check(config, &egress, &clock, &host_ids),
        vault_checks
    );
    let hosts: Vec<_> = lines
        .into_iter()
        .filter(|line| line.id == "host" && line.is_failed())
        .collect();
    if !hosts.is_empty() {
        return Err(CheckError::Lines(hosts));
    }
    let found: BTreeMap<_, _> = found
        .into_iter()
        .filter(|found| found.account == *account)
        .map(|found| (found.name.clone(), found))
        .collect();
    if found.is_empty() {
        return Err(CheckError::Lines(vault_lines));
    }
    let broker = build::broker(config, policy, egress, clock).map_err(|error| {
        let fix = "run `credbroker doctor` to find the cause";
        CheckError::Lines(vec![Diagnosis::failed("state", chain(&error), fix)])
    })?;
    let broker = Arc::new(broker);

    let public = host_ids.iter().map(|host_id| (*host_id, BrokerQuery::Time));
    let public = public.chain([((site, Host::Spot), BrokerQuery::MyIp)]);
    let public = public.map(|(host_id, query)| unsigned(&broker, host_id, query));
    let mut compared = futures_util::future::join_all(public).await;
    let mut requests = Vec::new();
    for (name, found) in &found {
        let scopes: BTreeSet<_> = of_account
            .keys
            .iter()
            .filter(|(_, named)| *named == name)
            .map(|(scope, _)| *scope)
            .collect();
        let (scope, info) = info_of(&scopes);
        requests.push((found, scope, info));
        for scope in scopes {
            requests.push((found, scope, read_of(scope)));
            requests.extend(order_of(scope).map(|order| (found, scope, order)));
        }
    }
    let signed = requests
        .into_iter()
        .map(|(found, scope, ask)| signed(&broker, found, scope, ask));
    compared.extend(futures_util::future::join_all(signed).await);
    let client_oid = RequestId::random();
    let lookups = of_account.keys.iter().filter_map(|(scope, name)| {
        let lookups = Lookup::of_no_order(*scope, client_oid.as_str());
        Some((found.get(name)?, lookups))
    });
    let lookups = lookups.flat_map(|(found, lookups)| {
        let lookups = lookups.into_iter();
        lookups.map(|lookup| not_found(&broker, found, lookup))
    });
    compared.extend(futures_util::future::join_all(lookups).await);
    broker.audit.flush().await;
    Ok(compared)
}

/// Sends a request that needs no key.
async fn unsigned(broker: &Broker, host_id: HostId, query: BrokerQuery) -> Diagnosis {
    let path = match query {
        BrokerQuery::MyIp => "/api/v1/my-ip",
        BrokerQuery::Time => "/api/v1/timestamp",
    };
    let exchanged = async {
        let connection = broker.egress.connect(host_id, true).await;
        let connection = connection.map_err(|error| chain(&error))?;
        let answer = broker.egress.ask(connection, query).await;
        answer.map_err(|error| chain(&error))
    };
    let late = || Err(format!("no response within {} s", ANSWER_WITHIN.as_secs()));
    let answer = timeout(ANSWER_WITHIN, exchanged)
        .await
        .unwrap_or_else(|_| late());
    let name = format!("GET {path} ({} host, unsigned)", host_id.1.as_str());
    let schema = schema(Method::Get, path);
    match answer {
        Ok(answer) => {
            let envelope: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
            let text = |name: &str| {
                envelope
                    .get(name)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
            };
            let response = Response {
                http_status: answer.status().as_u16(),
                code: text("code"),
                msg: text("msg"),
                body: answer.body(),
            };
            response.compare(name, schema)
        }
        Err(reason) => no_response(name, schema, &reason),
    }
}

/// Sends a request with a key: audited, signed and sent like a bot's request.
async fn signed(broker: &Arc<Broker>, found: &FoundKey, scope: Scope, ask: Ask) -> Diagnosis {
    let (method, path) = (ask.method, ask.path);
    let name = format!("{method} {path} ({scope}, key {})", found.name);
    let schema = schema(method, path);
    let key = Some(Arc::clone(&found.key));
    let request = broker.send_internal(Principal::Broker, &found.account, scope, ask, key);
    match request.await {
        Ok(receipt) => {
            let answer = &receipt.answer;
            let response = Response {
                http_status: answer.http_status.as_u16(),
                code: &answer.code,
                msg: &answer.msg,
                body: &answer.body,
            };
            let mut compared = response.compare(name, schema);
            if answer.outcome == Outcome::Rejected {
                let expected = broker.proof.expected();
                let refusal = key_info::refusal(&answer.code, &answer.msg, scope, expected);
                compared.fix = refusal.text();
            }
            compared
        }
        Err(error) => {
            let reason = match error.reason() {
                Reason::AnswerLost => error.of_repeatable_request(),
                _ => chain(&error),
            };
            no_response(name, schema, &reason)
        }
    }
}

/// Looks up an order that does not exist: only an answer that is known to mean "no such order" lets the broker free the
/// clientOid of an order that was lost.
async fn not_found(broker: &Arc<Broker>, found: &FoundKey, lookup: Lookup) -> Diagnosis {
    let request = lookup.request(found.account.clone(), RequestId::random());
    let path = &lookup.endpoint.path;
    let name = format!("GET {path} (no such order, key {})", found.name);
    let key = Some(Arc::clone(&found.key));
    let answered = broker.send_request(Principal::Broker, request, key).await;
    let answer = match answered {
        Ok(receipt) => receipt.answer,
        Err(error) => {
            let cause = format!(
                "expected an answer; got an error: {}",
                shown(&chain(&error))
            );
            let fix = "run `credbroker doctor` to check the network path to the exchange";
            return Diagnosis::failed(CHECK, cause, fix).about(name);
        }
    };
    let got = format!(
        "got HTTP {}, code {}, msg: {}",
        answer.http_status.as_u16(),
        shown(&answer.code),
        shown(&answer.msg)
    );
    if lookup.judge(&answer, 0, 0, &broker.not_found) == LookupResult::NotFound {
        let cause = format!("expected an answer that means \"no such order\"; {got}, which is one");
        return Diagnosis::ok(CHECK, cause).about(name);
    }
    let cause = format!(
        "expected an answer that is known to mean \"no such order\"; {got}. Until it is known, orders of this product whose answer was lost are never absent"
    );
    let fix = match lookup.entry_for(&answer) {
        Ok(entry) => format!("add this to exchange.not_found: {entry}"),
        Err(error) => {
            format!("{error}; correct what the other lines show, and run this command again")
        }
    };
    Diagnosis::warning(CHECK, cause, &fix).about(name)
}

fn expected(schema: Option<Schema>) -> String {
    let data = schema.map_or("anything", Schema::kind);
    format!("HTTP 200, code {}, data: {data}", code::SUCCESS)
}

fn no_response(request: String, schema: Option<Schema>, reason: &str) -> Diagnosis {
    let cause = format!(
        "expected {}; got an error: {}",
        expected(schema),
        shown(reason)
    );
    let fix = "run `credbroker doctor` to check the network path to the exchange";
    Diagnosis::failed(CHECK, cause, fix).about(request)
}

/// A complete response.
struct Response<'a> {
    http_status: u16,
    code: &'a str,
    msg: &'a str,
    body: &'a [u8],
}

impl Response<'_> {
    fn compare(&self, request: String, schema: Option<Schema>) -> Diagnosis {
        let Difference { kind, missing, new } = schema
            .map(|schema| schema.compare(self.body))
            .unwrap_or_default();
        let (http_status, code) = (self.http_status, shown(self.code));
        let mut actual = format!("HTTP {http_status}, code {code}, data: {kind}");
        if !self.msg.is_empty() {
            actual = format!("{actual}, msg: {}", shown(self.msg));
        }
        let is_accepted = http_status == 200 && self.code == code::SUCCESS;
        let is_of_kind = schema.is_none_or(|schema| schema.kind() == kind);
        // A rejected request has no data to compare.
        let mut differences = String::new();
        for (kind, fields) in [("missing", missing.join(", ")), ("new", new.join(", "))] {
            if is_accepted && !fields.is_empty() {
                differences = format!("{differences}; {kind} fields: {fields}");
            }
        }
        let cause = format!("expected {}; got {actual}{differences}", expected(schema));
        let compared = if !is_accepted || !is_of_kind {
            Diagnosis::failed(CHECK, cause, "")
        } else if !differences.is_empty() {
            Diagnosis::warning(CHECK, cause, "")
        } else {
            Diagnosis::ok(CHECK, cause + ", as documented")
        };
        compared.about(request)
    }
}

/// Text from the exchange, shortened, with everything masked that could be the id of a key or an order.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn possible_ids_of_keys_and_orders_are_masked() {
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
