//! What the audit log and the exchange say about each order.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::PathBuf;

use credbroker_sim::installation::MAIN_UID;
use serde_json::Value;

use super::judge::{Facts, Recorded};
use crate::drive::Simulator;

/// Reads the audit log as it grows.
pub(crate) struct AuditLog {
    path: PathBuf,
    read: u64,
    calls: HashMap<CallId, Call>,
    /// The calls with an `intent` line of each clientOid, oldest first.
    by_oid: HashMap<String, Vec<CallId>>,
}

/// Run, and number in it.
type CallId = (String, u64);

/// The results of a call that places orders.
#[derive(Default)]
struct Call {
    outcome: Option<LineResult>,
    late: Option<LineResult>,
    resolved: HashMap<String, Recorded>,
}

/// What a line says about the orders of its call.
struct LineResult {
    whole: Recorded,
    items: HashMap<String, Recorded>,
}

impl LineResult {
    fn of(line: &Value) -> Self {
        let mut items = HashMap::new();
        for item in line["items"].as_array().into_iter().flatten() {
            let oid = item["client_oid"].as_str().unwrap_or_default();
            items.insert(oid.to_owned(), recorded(item));
        }
        Self {
            whole: recorded(line),
            items,
        }
    }

    fn about(&self, oid: &str) -> Recorded {
        match self.items.get(oid) {
            Some(item) => item.clone(),
            None if self.items.is_empty() => self.whole.clone(),
            None => Recorded::Open,
        }
    }
}

/// The meaning of `outcome` or `state` of a line.
fn recorded(line: &Value) -> Recorded {
    let text = line["outcome"].as_str().or_else(|| line["state"].as_str());
    match text {
        Some("accepted" | "placed") => Recorded::Placed(
            line["order_id"]
                .as_str()
                .filter(|id| !id.is_empty())
                .map(str::to_owned),
        ),
        // Without an outcome: the exchange rejected it, because an earlier order has its clientOid.
        Some("rejected" | "not_sent" | "absent") | None => Recorded::NotPlaced,
        Some(_) => Recorded::Open,
    }
}

impl AuditLog {
    pub(crate) fn of(path: PathBuf) -> Self {
        Self {
            path,
            read: 0,
            calls: HashMap::new(),
            by_oid: HashMap::new(),
        }
    }

    /// Reads new lines; returns whether there were any.
    pub(crate) fn read_new(&mut self) -> bool {
        let mut file = File::open(&self.path).unwrap();
        file.seek(SeekFrom::Start(self.read)).unwrap();
        let (mut reader, before, mut line) = (BufReader::new(file), self.read, Vec::new());
        loop {
            line.clear();
            let length = reader.read_until(b'\n', &mut line).unwrap();
            if !line.ends_with(b"\n") {
                return self.read > before;
            }
            self.read += length as u64;
            // A torn line is about no order that was sent.
            if let Ok(line) = serde_json::from_slice::<Value>(&line)
                && line["bot"].is_string()
                && line["torn"] != true
            {
                self.take(&line);
            }
        }
    }

    fn take(&mut self, line: &Value) {
        let run = line["run"].as_str().unwrap().to_owned();
        let id = (run, line["call"].as_u64().unwrap());
        let event = line["event"].as_str().unwrap();
        if event == "intent" && line["method"] == "POST" {
            for oid in line["client_oids"].as_array().into_iter().flatten() {
                let oid = oid.as_str().unwrap().to_owned();
                self.by_oid.entry(oid).or_default().push(id.clone());
            }
            self.calls.insert(id, Call::default());
            return;
        }
        let Some(call) = self.calls.get_mut(&id) else {
            return;
        };
        match event {
            "outcome" => call.outcome = Some(LineResult::of(line)),
            "late_answer" => call.late = Some(LineResult::of(line)),
            "resolved" => {
                let oid = line["client_oid"].as_str().unwrap().to_owned();
                call.resolved.insert(oid, recorded(line));
            }
            _ => {}
        }
    }

    /// What the last lines about each call with this clientOid say.
    pub(crate) fn about(&self, oid: &str) -> Vec<Recorded> {
        let calls = self.by_oid.get(oid).map_or(&[][..], Vec::as_slice);
        let last_word = |id: &CallId| {
            let call = &self.calls[id];
            if let Some(resolved) = call.resolved.get(oid) {
                return resolved.clone();
            }
            let results = [&call.late, &call.outcome];
            let results = results
                .into_iter()
                .flatten()
                .map(|result| result.about(oid));
            let mut known = results.filter(|record| *record != Recorded::Open);
            known.next().unwrap_or(Recorded::Open)
        };
        calls.iter().map(last_word).collect()
    }

    /// Whether the lookups of all orders have ended.
    pub(crate) fn is_settled(&self) -> bool {
        self.by_oid.iter().all(|(oid, calls)| {
            calls.iter().all(|id| {
                let call = &self.calls[id];
                call.resolved.contains_key(oid)
                    || self
                        .about(oid)
                        .iter()
                        .all(|record| *record != Recorded::Open)
            })
        })
    }

    pub(crate) fn client_oids(&self) -> impl Iterator<Item = &String> {
        self.by_oid.keys()
    }
}

/// Adds what the exchange has of each order.
pub(crate) async fn add_exchange(kucoin: &Simulator, facts: &mut HashMap<String, Facts>) {
    let mut of_others = Vec::new();
    let placing = kucoin.control("GET", "placing", Value::Null).await;
    for request in placing.as_array().unwrap() {
        if request["agent"].is_null() {
            let created = request["created"].as_array().unwrap().iter();
            of_others.extend(created.map(|id| id.as_str().unwrap().to_owned()));
            continue;
        }
        for oid in request["client_oids"].as_array().unwrap() {
            let facts = facts.entry(oid.as_str().unwrap().to_owned()).or_default();
            facts.received_ms.push(request["at_ms"].as_i64().unwrap());
        }
    }
    let orders = format!("orders?uid={MAIN_UID}");
    let orders = kucoin.control("GET", &orders, Value::Null).await;
    for order in orders.as_array().unwrap() {
        let oid = order["client_oid"].as_str().unwrap();
        let facts = facts.entry(oid.to_owned()).or_default();
        let id = order["id"].as_str().unwrap().to_owned();
        if of_others.contains(&id) {
            facts.others.push(id);
        } else {
            facts.book.push(id);
        }
    }
}
