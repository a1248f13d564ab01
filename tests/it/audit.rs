//! The audit log: a line before each request, a line after it, and what happens when it cannot be written.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Mutex;

use credbroker::proto::{Method, Outcome, QueryParameter, Scope, SignAndSendRequest};
use credbroker::server::{Server, StartError};
use credbroker_sim::installation::{MAIN_UID, Settings};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tonic::Code;

use crate::harness::{Lab, accounts, refusal, request, spot_cancel_all, spot_order, until};

#[tokio::test]
async fn call_writes_an_intent_line_and_an_outcome_line() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let mut order = spot_order("oid-1");
    order.request_id = "call-1".to_owned();
    // printf '%s' "$body" | openssl dgst -sha256
    order.body = r#"{"clientOid":"oid-1","side":"buy","symbol":"BTC-USDT","type":"limit","price":"1","size":"1"}"#.into();
    bot.send(order).await.unwrap();
    let lines = lab.audit_of("call-1");
    assert_eq!(lines.len(), 2);
    let (intent, outcome) = (&lines[0], &lines[1]);
    let expected = json!({
        "event": "intent", "request_id": "call-1", "bot": "spiffe://demo.test/bot/maker",
        "endpoint": "spot.post.v1-hf-orders", "account": "main", "scope": "spot-margin", "method": "POST",
        "target": "/api/v1/hf/orders", "body_bytes": 92, "client_oids": ["oid-1"],
        "body_sha256": "0cccf24a2f09b389ede297b563075da25baef9c9fae0b51d44b0e6e350cb21e4",
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&intent[key], value, "{key} of {intent}");
    }
    assert!(intent["time_ms"].as_i64().unwrap() <= outcome["time_ms"].as_i64().unwrap());
    assert_eq!(
        (&intent["run"], &intent["call"]),
        (&outcome["run"], &outcome["call"])
    );
    assert_eq!(outcome["event"], "outcome");
    for key in ["bot", "account", "scope", "endpoint", "request_id"] {
        assert_eq!(outcome[key], intent[key], "{key}");
    }
    assert_eq!(outcome["outcome"], "accepted");
    assert_eq!(outcome["http_status"], 200);
    assert_eq!(outcome["code"], "200000");
    // Both clocks are the same here, apart from the measurement error.
    let apart_ms = outcome["timestamp_ms"].as_i64().unwrap() - intent["time_ms"].as_i64().unwrap();
    assert!(apart_ms.abs() < 2000, "{apart_ms}");
    assert!(outcome.get("reason").is_none());
    lab.stop().await;
}

#[tokio::test]
async fn client_oids_in_path_query_and_batch_bodies_are_audited() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let in_path = "/api/v1/hf/orders/client-order/in-path?symbol=BTC-USDT";
    let in_query = "/api/v1/orders/byClientOid?clientOid=in-query";
    let batch = r#"{"orderList":[{"clientOid":"a"},{"clientOid":"b"}]}"#;
    let calls = [
        (
            request(Scope::SpotMargin, Method::Delete, in_path, ""),
            json!(["in-path"]),
        ),
        (
            request(Scope::Futures, Method::Get, in_query, ""),
            json!(["in-query"]),
        ),
        (
            request(
                Scope::SpotMargin,
                Method::Post,
                "/api/v1/hf/orders/multi",
                batch,
            ),
            json!(["a", "b"]),
        ),
    ];
    for (index, (mut call, oids)) in calls.into_iter().enumerate() {
        call.request_id = format!("oid-{index}");
        bot.send(call).await.unwrap();
        assert_eq!(
            lab.audit_of(&format!("oid-{index}"))[0]["client_oids"],
            oids
        );
    }
    lab.stop().await;
}

#[tokio::test]
async fn denied_call_writes_one_line_with_secrets_masked() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let mut delete_key = request(Scope::SpotMargin, Method::Delete, "/api/v1/sub/api-key", "");
    delete_key.query = ["apiKey", "subName", "passphrase"]
        .map(|name| QueryParameter {
            name: name.to_owned(),
            value: "fake-pass-7".to_owned(),
        })
        .to_vec();
    delete_key.request_id = "denied".to_owned();
    assert_eq!(
        refusal(bot.send(delete_key).await).0,
        Code::PermissionDenied
    );
    let lines = lab.audit_of("denied");
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["event"], "denied");
    assert_eq!(lines[0]["reason"], "POLICY_DENIED");
    assert_eq!(lines[0]["outcome"], "not_sent");
    assert!(
        lines[0]["detail"]
            .as_str()
            .unwrap()
            .contains("never be granted")
    );
    let target = lines[0]["target"].as_str().unwrap();
    assert!(target.ends_with("&passphrase=%2A%2A%2A"), "{target}");

    let mut malformed = accounts();
    malformed.path = "/api/v1/../v2".to_owned();
    malformed.request_id = "malformed".to_owned();
    assert_eq!(refusal(bot.send(malformed).await).0, Code::InvalidArgument);
    let lines = lab.audit_of("malformed");
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["reason"], "REQUEST_MALFORMED");
    assert_eq!(lines[0]["detail"], "malformed: path");
    lab.stop().await;
}

#[tokio::test]
async fn without_an_audit_log_risk_increasing_requests_are_refused_and_cancels_work() {
    let settings = Settings {
        config: "[audit]\nfile = \"/dev/full\"".to_owned(),
        wait_ready: false,
        ..Settings::default()
    };
    let mut lab = Lab::with(settings).await;
    // Unaudited cancels appear only in the log.
    lab.is_audit_checked = false;
    lab.until_only_the_audit_log_fails().await;
    assert_eq!(lab.metric("audit_writable").await, Some(0.0));
    let mut bot = lab.bot("maker").await;
    let refused = refusal(bot.send(spot_order("unrecorded")).await);
    assert_eq!(
        refused,
        (
            Code::Unavailable,
            "AUDIT_UNAVAILABLE".to_owned(),
            "not_sent".to_owned()
        )
    );
    let leverage = r#"{"symbol":"XBTUSDTM","leverage":"5"}"#;
    let config = request(
        Scope::Futures,
        Method::Post,
        "/api/v2/changeCrossUserLeverage",
        leverage,
    );
    assert_eq!(refusal(bot.send(config).await).1, "AUDIT_UNAVAILABLE");
    assert!(lab.kucoin.received().is_empty());
    assert!(lab.kucoin.orders(MAIN_UID).is_empty());

    let test = request(
        Scope::SpotMargin,
        Method::Post,
        "/api/v1/hf/orders/test",
        r#"{"clientOid":"t"}"#,
    );
    let cancel_all = "/api/v1/hf/orders?symbol=BTC-USDT";
    let still_allowed = [
        accounts(),
        request(Scope::SpotMargin, Method::Delete, cancel_all, ""),
        request(
            Scope::SpotMargin,
            Method::Delete,
            "/api/v1/hf/orders/cancelAll",
            "",
        ),
        request(
            Scope::Futures,
            Method::Delete,
            "/api/v3/orders?symbol=XBTUSDTM",
            "",
        ),
        test,
    ];
    for call in still_allowed {
        let path = call.path.clone();
        assert!(bot.send(call).await.is_ok(), "{path}");
    }
    assert_eq!(lab.server.take().unwrap().stop().await, 0);
}

#[tokio::test]
async fn second_broker_on_the_same_state_folder_does_not_start() {
    let mut lab = Lab::start().await;
    let second = Server::start(lab.config()).await.unwrap_err();
    assert!(matches!(second, StartError::Locked(_)), "{second}");
    lab.stop().await;
    let mut third = Server::start(lab.config()).await;
    assert!(
        third.as_mut().is_ok(),
        "a stopped broker must release the lock"
    );
    assert_eq!(third.unwrap().stop().await, 0);
}

#[tokio::test]
async fn restarted_broker_appends_to_the_same_audit_log() {
    let mut lab = Lab::start().await;
    lab.bot("maker").await.send(accounts()).await.unwrap();
    lab.stop().await;
    lab.start_broker().await;
    lab.until_ready().await;
    let answer = lab.bot("maker").await.send(accounts()).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    lab.stop().await;
    let lines = lab.audit();
    assert_eq!(lines.len(), 4);
    assert_ne!(lines[0]["run"], lines[3]["run"]);
}

#[tokio::test]
async fn audit_log_is_reopened_after_it_is_renamed_or_removed() {
    let mut lab = Lab::start().await;
    // The lines of a removed file cannot be checked.
    lab.is_audit_checked = false;
    let mut bot = lab.bot("maker").await;
    let path = lab.path("state/audit.jsonl");
    bot.send(spot_order("before")).await.unwrap();
    std::fs::rename(&path, lab.path("state/audit.jsonl.1")).unwrap();
    until("a new file is created", async || path.exists()).await;
    bot.send(spot_order("between")).await.unwrap();
    let events = |lab: &Lab| lab.audit().len();
    assert_eq!(events(&lab), 2, "only lines written after the rename");
    let old = std::fs::read_to_string(lab.path("state/audit.jsonl.1")).unwrap();
    assert!(old.contains("before") && !old.contains("between"));
    std::fs::remove_file(&path).unwrap();
    until("another file is created", async || path.exists()).await;
    bot.send(spot_order("after")).await.unwrap();
    assert_eq!(events(&lab), 2);
    let unresolved = lab.server.take().unwrap().stop().await;
    assert_eq!(unresolved, 0);
}

/// Limits the size of the broker's files, like a full disk; `None` removes the limit.
fn limit_files(lab: &Lab, bytes: Option<u64>) {
    let id = lab.process.as_ref().unwrap().id();
    let pid = Pid::from_raw(i32::try_from(id).unwrap());
    let limit = Rlimit {
        current: bytes,
        maximum: None,
    };
    prlimit(pid, Resource::Fsize, limit).unwrap();
}

/// Parses every line of an audit file.
fn parsed(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n'), "{text}");
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
    text.lines().map(parse).collect()
}

#[tokio::test]
async fn every_audit_line_parses_after_the_disk_was_full() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    let path = lab.path("state/audit.jsonl");
    let length = || std::fs::metadata(&path).unwrap().len();
    let mut bot = lab.bot("maker").await;
    bot.send(accounts()).await.unwrap();
    let torn = |lines: &[Value]| lines.iter().filter(|line| line["torn"] == true).count();
    let markers = |lines: &[Value]| lines.iter().filter(|line| line["event"] == "torn").count();

    // The running broker completes a torn line at its next write.
    let full = length() + 150;
    limit_files(&lab, Some(full));
    let refused = refusal(bot.send(spot_order("torn")).await);
    assert_eq!(refused.1, "AUDIT_UNAVAILABLE");
    assert_eq!(length(), full, "half a line");
    assert_eq!(
        refusal(bot.send(spot_order("full")).await).1,
        "AUDIT_UNAVAILABLE"
    );
    assert_eq!(length(), full);
    limit_files(&lab, None);
    bot.send(spot_order("whole")).await.unwrap();
    let lines = parsed(&path);
    assert_eq!((torn(&lines), markers(&lines)), (1, 1));
    let at = lines.iter().position(|line| line["torn"] == true).unwrap();
    let events = (&lines[at]["event"], &lines[at + 1]["event"]);
    assert_eq!(events, (&json!("intent"), &json!("torn")));

    // The broker completes a torn line at its next start.
    limit_files(&lab, Some(length() + 70));
    refusal(bot.send(spot_order("torn-again")).await);
    lab.process().signal("KILL");
    lab.process().exit_code().await;
    assert!(!std::fs::read(&path).unwrap().ends_with(b"\n"));
    lab.spawn_broker().await;
    lab.until_ready().await;
    lab.until_keys_tested().await;
    let lines = parsed(&path);
    assert_eq!((torn(&lines), markers(&lines)), (2, 2));

    // The broker completes a torn line after the file was rotated.
    limit_files(&lab, Some(length() + 90));
    let mut bot = lab.bot("maker").await;
    refusal(bot.send(spot_order("torn-and-rotated")).await);
    let rotated = lab.path("state/audit.jsonl.1");
    limit_files(&lab, None);
    std::fs::rename(&path, &rotated).unwrap();
    until("a new file is created", async || path.exists()).await;
    until("the rotated file is completed", async || {
        std::fs::read(&rotated).unwrap().ends_with(b"\n")
    })
    .await;
    let lines = parsed(&rotated);
    assert_eq!((torn(&lines), markers(&lines)), (3, 3));
    bot.send(spot_order("new-file")).await.unwrap();
    parsed(&path);
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 2);
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

/// A named pipe as audit file: writes to it hang while nobody reads it.
struct AuditPipe {
    reader: File,
    text: Mutex<String>,
}

impl AuditPipe {
    fn create(path: &Path) -> Self {
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let mut options = File::options();
        options
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        Self {
            reader: options.open(path).unwrap(),
            text: Mutex::default(),
        }
    }

    /// Fills the pipe with empty lines.
    fn fill(path: &Path) {
        let mut options = File::options();
        options
            .write(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed());
        let mut writer = options.open(path).unwrap();
        while writer.write(b"\n").is_ok() {}
    }

    /// Reads what is in the pipe, and returns every audit line of a bot so far.
    fn lines(&self) -> Vec<Value> {
        let (mut bytes, mut text) = (vec![0; 65536], self.text.lock().unwrap());
        while let Ok(count @ 1..) = (&self.reader).read(&mut bytes) {
            *text += str::from_utf8(&bytes[..count]).unwrap();
        }
        let complete = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = complete.lines().filter(|line| !line.is_empty());
        let mut lines: Vec<Value> = lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        lines.retain(|line| line["bot"].is_string());
        lines
    }
}

fn cancel(request_id: &str) -> SignAndSendRequest {
    SignAndSendRequest {
        request_id: request_id.to_owned(),
        ..spot_cancel_all()
    }
}

#[tokio::test]
async fn while_the_audit_disk_hangs_orders_are_refused_and_cancels_are_recorded_in_the_reserve() {
    let mut lab = Lab::install(Settings {
        config: "[audit]\nfile = \"audit.pipe\"".to_owned(),
        ..Settings::default()
    })
    .await;
    lab.is_audit_checked = false;
    let path = lab.path("audit.pipe");
    let pipe = AuditPipe::create(&path);
    lab.start_broker().await;
    lab.until_ready().await;
    let mut bot = lab.bot("maker").await;
    bot.send(spot_order("before")).await.unwrap();
    assert_eq!(pipe.lines().len(), 2);

    AuditPipe::fill(&path);
    let mut order = spot_order("hangs");
    order.request_id = "hangs".to_owned();
    assert_eq!(refusal(bot.send(order).await).1, "AUDIT_UNAVAILABLE");
    // From now on it is known that the write hangs.
    let mut order = spot_order("refused");
    order.request_id = "refused".to_owned();
    assert_eq!(refusal(bot.send(order).await).1, "AUDIT_UNAVAILABLE");
    for request_id in ["cancel-1", "cancel-2"] {
        let answer = bot.send(cancel(request_id)).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Accepted);
    }
    bot.send(accounts()).await.unwrap();
    assert_eq!(lab.metric("audit_writable").await, Some(0.0));
    assert!(lab.metric("audit_lines_waiting").await > Some(5.0));
    let readyz = lab.get("/readyz").await.1;
    assert!(
        readyz.contains("cannot be written: a write to it hangs"),
        "{readyz}"
    );
    assert_eq!(lab.kucoin.orders(MAIN_UID).len(), 1);
    let reserve = || std::fs::read(lab.path("state/audit.reserve")).unwrap();
    let in_reserve = |id: &str| {
        let (text, id) = (reserve(), format!("\"request_id\":\"{id}\""));
        text.windows(id.len())
            .filter(|part| *part == id.as_bytes())
            .count()
    };
    until("the cancels are in the reserve", async || {
        in_reserve("cancel-1") == 2 && in_reserve("cancel-2") == 2
    })
    .await;
    assert_eq!(reserve().len(), 16 << 20);

    until("all lines are in the audit log", async || {
        pipe.lines().len() == 11
    })
    .await;
    let lines = pipe.lines();
    let shown = |line: &Value| {
        let text = |field: &str| line[field].as_str().unwrap_or_default().to_owned();
        format!(
            "{} {} {}",
            text("request_id"),
            text("event"),
            text("outcome")
        )
    };
    let shown: Vec<_> = lines[2..9].iter().map(shown).collect();
    let expected = [
        "hangs intent ",
        "hangs outcome not_sent",
        "refused denied not_sent",
        "cancel-1 intent ",
        "cancel-1 outcome accepted",
        "cancel-2 intent ",
        "cancel-2 outcome accepted",
    ];
    assert_eq!(shown, expected);
    assert!(lines.is_sorted_by_key(|line| line["time_ms"].as_i64()));
    until("the reserve is empty", async || reserve()[0] == 0).await;
    bot.send(spot_order("after")).await.unwrap();
    assert_eq!(lab.metric("audit_writable").await, Some(1.0));
    assert_eq!(pipe.lines().len(), 13);
    assert_eq!(lab.server.take().unwrap().stop().await, 0);
}

#[tokio::test]
async fn lines_in_the_reserve_are_added_to_the_audit_log_at_the_next_start() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    lab.until_keys_tested().await;
    let path = lab.path("state/audit.jsonl");
    let mut bot = lab.bot("maker").await;
    bot.send(accounts()).await.unwrap();
    limit_files(&lab, Some(std::fs::metadata(&path).unwrap().len()));
    for request_id in ["first", "second"] {
        let answer = bot.send(cancel(request_id)).await.unwrap();
        assert_eq!(answer.outcome(), Outcome::Accepted);
    }
    lab.process().signal("KILL");
    lab.process().exit_code().await;
    for request_id in ["first", "second"] {
        assert!(lab.audit_of(request_id).is_empty());
    }
    lab.spawn_broker().await;
    lab.until_ready().await;
    let lines = lab.audit_file();
    let of = |id: &str| -> Vec<_> {
        let lines = lines.iter().enumerate();
        let lines = lines.filter(|(_, line)| line["request_id"] == id);
        lines
            .map(|(index, line)| (index, line["event"].as_str().unwrap()))
            .collect()
    };
    let [(first, "intent"), (_, "outcome")] = of("first")[..] else {
        panic!("{lines:?}");
    };
    let [(_, "intent"), (last, "outcome")] = of("second")[..] else {
        panic!("{lines:?}");
    };
    let run = &lines[first]["run"];
    assert!(lines[..=last].iter().all(|line| line["run"] == *run));
    assert!(lines[last + 1..].iter().all(|line| line["run"] != *run));
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn reserve_that_cannot_be_opened_is_in_readyz_and_the_broker_is_ready() {
    let mut lab = Lab::install(Settings::default()).await;
    let reserve = lab.path("state/audit.reserve");
    std::fs::create_dir_all(reserve.parent().unwrap()).unwrap();
    std::os::unix::fs::symlink(lab.path("elsewhere"), &reserve).unwrap();
    lab.start_broker().await;
    lab.until_ready().await;
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 200);
    assert!(
        text.contains("the reserve of the audit log cannot be written: "),
        "{text}"
    );
    let mut bot = lab.bot("maker").await;
    bot.send(spot_order("accepted")).await.unwrap();
    assert!(!lab.path("elsewhere").exists());
    assert_eq!(lab.stop().await, 0);
}
