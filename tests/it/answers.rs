//! How the broker interprets answers of the exchange: codes, encodings, header lines, retry delays, and answers to another
//! request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use credbroker::proto::{Method, Outcome, Scope, SignAndSendRequest, SignAndSendResponse};
use credbroker_sim::installation::{RULES, Settings, grant};
use credbroker_sim::kucoin::ReceivedRequest;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tonic::{Code, Status};

use crate::harness::{
    Lab, failure, futures_order, json_of, refusal, request, spot_cancel_all, spot_order,
};

const ORDERS: &str = "/api/v1/hf/orders";

/// A proxy before a host of the simulated exchange: returns fixed bytes for chosen paths and forwards everything else.
#[derive(Clone)]
pub(crate) struct Exchange {
    host: &'static str,
    address: SocketAddr,
    upstream: Arc<Mutex<Option<String>>>,
    answers: Arc<Mutex<HashMap<String, Vec<u8>>>>,
    /// Requested paths, each with the number of its connection.
    requested: Arc<Mutex<Vec<(String, usize)>>>,
}

impl Exchange {
    pub(crate) async fn start(host: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let exchange = Self {
            host,
            address: listener.local_addr().unwrap(),
            upstream: Arc::default(),
            answers: Arc::default(),
            requested: Arc::default(),
        };
        let serving = exchange.clone();
        tokio::spawn(async move {
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                tokio::spawn(serving.clone().serve(stream, number));
            }
        });
        exchange
    }

    /// Settings with which the broker connects to this proxy.
    pub(crate) fn settings(&self) -> Settings {
        let exchange = self.clone();
        let edit = move |config: String| {
            let key = format!("{} = \"http://", exchange.host);
            let (before, rest) = config.split_once(&key).unwrap();
            let (upstream, after) = rest.split_once('"').unwrap();
            *exchange.upstream.lock().unwrap() = Some(upstream.to_owned());
            format!("{before}{key}{}\"{after}", exchange.address)
        };
        Settings {
            edit: Box::new(edit),
            process: true,
            ..Settings::default()
        }
    }

    /// Answers every request to `path` with these bytes from now on.
    pub(crate) fn answer(&self, path: &str, answer: impl Into<Vec<u8>>) {
        let mut answers = self.answers.lock().unwrap();
        answers.insert(path.to_owned(), answer.into());
    }

    /// Forwards requests to `path` again.
    fn pass(&self, path: &str) {
        self.answers.lock().unwrap().remove(path);
    }

    /// The numbers of the connections on which `path` was requested.
    pub(crate) fn connections(&self, path: &str) -> Vec<usize> {
        let requested = self.requested.lock().unwrap();
        let requested = requested.iter().filter(|(requested, _)| requested == path);
        requested.map(|(_, number)| *number).collect()
    }

    async fn serve(self, mut from: TcpStream, number: usize) {
        let upstream = self.upstream.lock().unwrap().clone().unwrap();
        let mut to = TcpStream::connect(upstream).await.unwrap();
        while let Some(request) = message(&mut from).await {
            let head = String::from_utf8_lossy(&request);
            let target = head.split(' ').nth(1).unwrap();
            let path = target.split('?').next().unwrap().to_owned();
            self.requested.lock().unwrap().push((path.clone(), number));
            let chosen = self.answers.lock().unwrap().get(&path).cloned();
            let answer = if let Some(answer) = chosen {
                answer
            } else {
                to.write_all(&request).await.unwrap();
                message(&mut to).await.unwrap()
            };
            if from.write_all(&answer).await.is_err() {
                return;
            }
        }
    }
}

/// Reads an HTTP/1.1 message and its body; `None` if the connection is closed.
async fn message(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    loop {
        let end = bytes.windows(4).position(|part| part == b"\r\n\r\n");
        if let Some(end) = end {
            let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
            let length = head.split("content-length:").nth(1);
            let length = length.map_or(0, |rest| {
                rest.lines().next().unwrap().trim().parse().unwrap()
            });
            if bytes.len() >= end + 4 + length {
                return Some(bytes);
            }
        }
        if stream.read_buf(&mut bytes).await.unwrap_or_default() == 0 {
            return None;
        }
    }
}

/// An HTTP answer with a JSON body.
pub(crate) fn http(status: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn ok(body: &Value) -> String {
    http("200 OK", &body.to_string())
}

/// An HTTP answer from the field cases.
fn field_case(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/field-cases/answers");
    std::fs::read(folder.join(name)).unwrap()
}

fn v2_order(client_oid: &str) -> SignAndSendRequest {
    let body = json!({"clientOid": client_oid, "symbol": "XBTUSDTM", "side": "BUY", "type": "LIMIT", "price": "1", "size": 1});
    request(
        Scope::Futures,
        Method::Post,
        "/api/v2/order",
        &body.to_string(),
    )
}

fn verdict(answer: &SignAndSendResponse) -> (Outcome, &str) {
    (answer.outcome(), answer.code.as_str())
}

async fn metric(lab: &Lab, line: &str) -> u64 {
    let text = lab.get("/metrics").await.1;
    let value = text.lines().find_map(|l| l.strip_prefix(line));
    value
        .unwrap_or_else(|| panic!("no {line} in\n{text}"))
        .trim()
        .parse()
        .unwrap()
}

#[tokio::test]
async fn order_is_accepted_only_by_a_code_that_its_endpoint_documents() {
    let exchange = Exchange::start("futures").await;
    let v2 = grant("maker", "main", "futures", "\"futures.post.v2-order\"");
    let settings = Settings {
        rules: RULES.to_owned() + &v2,
        ..exchange.settings()
    };
    let lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    let accepted = field_case("futures-v2-order-taken.http");
    exchange.answer("/api/v2/order", accepted.clone());
    let answer = bot.send(v2_order("v2-1")).await.unwrap();
    assert_eq!(verdict(&answer), (Outcome::Accepted, "200"));
    assert_eq!(answer.advice, "");
    // On an endpoint that does not document this code, the outcome is uncertain.
    exchange.answer("/api/v1/orders", accepted);
    let answer = bot.send(futures_order("v1-1")).await.unwrap();
    assert_eq!(verdict(&answer), (Outcome::MaybeSent, "200"));
}

#[tokio::test]
async fn order_is_maybe_sent_on_an_unknown_code_which_is_counted_and_logged_once() {
    const COUNTER: &str = "credbroker_codes_unknown_total{scope=\"spot-margin\"} ";
    let exchange = Exchange::start("spot").await;
    let mut lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    let unknown = ok(&json!({"code": "987654", "msg": "something new"}));
    exchange.answer(ORDERS, unknown.clone());
    assert_eq!(metric(&lab, COUNTER).await, 0);
    for number in 0..3 {
        let order = spot_order(&format!("unknown-{number}"));
        let answer = bot.send(order).await.unwrap();
        assert_eq!(verdict(&answer), (Outcome::MaybeSent, "987654"));
        assert!(
            answer.advice.contains("does not recognize this code"),
            "{}",
            answer.advice
        );
    }
    assert_eq!(metric(&lab, COUNTER).await, 3);
    let cancelled = bot.send(spot_cancel_all()).await.unwrap();
    assert_eq!(cancelled.outcome(), Outcome::MaybeSent, "a cancel too");
    // For a read, or with an HTTP error status, the same code means rejected.
    exchange.answer("/api/v1/accounts", unknown);
    let read = request(Scope::SpotMargin, Method::Get, "/api/v1/accounts", "");
    assert_eq!(bot.send(read).await.unwrap().outcome(), Outcome::Rejected);
    let refused = http(
        "400 Bad Request",
        r#"{"code":"987654","msg":"something new"}"#,
    );
    exchange.answer(ORDERS, refused);
    let answer = bot.send(spot_order("refused")).await.unwrap();
    assert_eq!(verdict(&answer), (Outcome::Rejected, "987654"));
    assert_eq!(metric(&lab, COUNTER).await, 4);
    let log = lab.process().log();
    let lines: Vec<_> = log
        .lines()
        .filter(|line| line.contains("unknown code;"))
        .collect();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let line: Value = serde_json::from_str(lines[0]).unwrap();
    assert_eq!(line["level"], "WARN");
    assert_eq!(line["refusal_code"], "\"spot/spot/987654\"");
    assert!(!lines[0].contains("something new"), "{}", lines[0]);
}

#[tokio::test]
async fn advice_never_suggests_a_code_that_refusal_codes_does_not_accept() {
    let exchange = Exchange::start("spot").await;
    let mut lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    exchange.answer(ORDERS, ok(&json!({"code": "OK"})));
    let answer = bot.send(spot_order("ok")).await.unwrap();
    assert_eq!(verdict(&answer), (Outcome::MaybeSent, "OK"));
    assert!(
        answer.advice.contains("look the order up by its clientOid")
            && !answer.advice.contains("refusal_codes"),
        "{}",
        answer.advice
    );
    let line = lab
        .process()
        .log_line("unknown code; outcome is maybe_sent; the code cannot be listed in exchange.refusal_codes, so report it as a credbroker bug")
        .await;
    assert_eq!(line["level"], "WARN");
    assert!(line.get("config").is_none(), "{line}");
}

#[tokio::test]
async fn unknown_code_is_not_counted_when_the_answer_is_ambiguous_anyway() {
    const COUNTER: &str = "credbroker_codes_unknown_total{scope=\"spot-margin\"} ";
    let exchange = Exchange::start("spot").await;
    let mut lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    for (number, answer) in [
        http("500 Internal Server Error", r#"{"code":"987654"}"#),
        http("200 OK", r#"{"code":"987654","success":true}"#),
    ]
    .into_iter()
    .enumerate()
    {
        exchange.answer(ORDERS, answer);
        let order = spot_order(&format!("open-{number}"));
        let answer = bot.send(order).await.unwrap();
        assert_eq!(verdict(&answer), (Outcome::MaybeSent, "987654"));
        assert!(
            answer.advice.contains("look the order up by its clientOid")
                && !answer.advice.contains("refusal_codes"),
            "{}",
            answer.advice
        );
    }
    assert_eq!(metric(&lab, COUNTER).await, 0);
    assert!(!lab.process().log().contains("unknown code;"));
}

#[tokio::test]
async fn order_is_maybe_sent_on_http_400_with_an_unreadable_code() {
    let exchange = Exchange::start("spot").await;
    let lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    let br = "content-encoding: br\r\ncontent-type";
    for (number, (answer, expected)) in [
        (
            http("400 Bad Request", r#"{"code":"500000","msg":{"a":1}}"#),
            (Outcome::MaybeSent, "500000"),
        ),
        (
            http("400 Bad Request", r#"{"code":500000.0}"#),
            (Outcome::MaybeSent, ""),
        ),
        (
            http("400 Bad Request", "encoded").replace("content-type", br),
            (Outcome::MaybeSent, ""),
        ),
        (
            http("403 Forbidden", "encoded").replace("content-type", br),
            (Outcome::Rejected, ""),
        ),
        (
            http("400 Bad Request", "<html>400</html>"),
            (Outcome::Rejected, ""),
        ),
    ]
    .into_iter()
    .enumerate()
    {
        exchange.answer(ORDERS, answer.clone());
        let order = spot_order(&format!("unread-{number}"));
        let response = bot.send(order).await.unwrap();
        assert_eq!(verdict(&response), expected, "{answer}");
    }
}

#[tokio::test]
async fn code_listed_in_refusal_codes_rejects_the_order() {
    let exchange = Exchange::start("spot").await;
    let mut settings = exchange.settings();
    let edit = settings.edit;
    settings.edit = Box::new(move |config| {
        edit(config).replace(
            "[exchange]\n",
            "[exchange]\nrefusal_codes = [\"spot/spot/987654\"]\n",
        )
    });
    let lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    exchange.answer(
        ORDERS,
        ok(&json!({"code": "987654", "msg": "something new"})),
    );
    let answer = bot.send(spot_order("configured")).await.unwrap();
    assert_eq!(verdict(&answer), (Outcome::Rejected, "987654"));
    exchange.answer(
        "/api/v3/hf/margin/order",
        ok(&json!({"code": "987654", "msg": "something new"})),
    );
    let mut margin = spot_order("margin");
    margin.path = "/api/v3/hf/margin/order".to_owned();
    let answer = bot.send(margin).await.unwrap();
    assert_eq!(
        verdict(&answer),
        (Outcome::MaybeSent, "987654"),
        "another product"
    );
}

#[tokio::test]
async fn order_is_maybe_sent_on_a_contradictory_answer() {
    let exchange = Exchange::start("spot").await;
    let lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    for (number, answer) in [
        http(
            "500 Internal Server Error",
            r#"{"code":"200000","data":{}}"#,
        ),
        http("200 OK", r#"{"code":"200000","success":false,"data":null}"#),
        http("200 OK", r#"["200000"]"#),
        http("200 OK", r#"["400100","no"]"#),
        http("200 OK", r#""200000""#),
        http(
            "200 OK",
            r#"{"code":"200000","msg":"Position does not exist"}"#,
        ),
    ]
    .into_iter()
    .enumerate()
    {
        exchange.answer(ORDERS, answer.clone());
        let response = bot
            .send(spot_order(&format!("contradictory-{number}")))
            .await
            .unwrap();
        assert_eq!(response.outcome(), Outcome::MaybeSent, "{answer}");
    }
}

#[tokio::test]
async fn compressed_answer_is_decoded_and_interpreted_like_a_plain_one() {
    let exchange = Exchange::start("spot").await;
    let lab = Lab::with(Settings {
        egress: "max_answer_bytes = 1024".to_owned(),
        ..exchange.settings()
    })
    .await;
    let mut bot = lab.bot("maker").await;
    let received = lab.kucoin.everything_received();
    assert!(!received.is_empty());
    for request in received {
        assert_eq!(
            request.header("accept-encoding"),
            Some("identity"),
            "{}",
            request.path()
        );
    }
    exchange.answer(ORDERS, field_case("gzip-order-taken.http"));
    // The clientOid in the file.
    let accepted = bot.send(spot_order("c-1")).await.unwrap();
    assert_eq!(verdict(&accepted), (Outcome::Accepted, "200000"));
    assert_eq!(json_of(&accepted)["data"]["orderId"], "o-1");
    assert_eq!(accepted.content_encoding, "");
    exchange.answer(ORDERS, field_case("gzip-order-refused.http"));
    let refused = bot.send(spot_order("gzip-2")).await.unwrap();
    assert_eq!(refused.outcome(), Outcome::Rejected);
    assert_eq!(json_of(&refused)["code"], refused.code.as_str());
    exchange.answer("/api/v1/accounts", field_case("gzip-read.http"));
    let read = request(Scope::SpotMargin, Method::Get, "/api/v1/accounts", "");
    let read = bot.send(read).await.unwrap();
    assert_eq!(verdict(&read), (Outcome::Accepted, "200000"));
    assert_eq!(json_of(&read)["code"], "200000");
}

#[tokio::test]
async fn undecodable_answer_is_forwarded_and_the_size_limit_applies_after_decoding() {
    let exchange = Exchange::start("spot").await;
    let mut lab = Lab::with(Settings {
        egress: "max_answer_bytes = 1024".to_owned(),
        ..exchange.settings()
    })
    .await;
    let mut bot = lab.bot("maker").await;
    let encoded = |encoding: &str, body: &[u8]| {
        let length = body.len();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-encoding: {encoding}\r\ncontent-length: {length}\r\n\r\n"
        );
        [head.as_bytes(), body].concat()
    };
    exchange.answer(ORDERS, encoded("br", b"\x0b\x02\x80{}\x03"));
    let answer = bot.send(spot_order("br")).await.unwrap();
    assert_eq!(verdict(&answer), (Outcome::MaybeSent, ""));
    assert_eq!(answer.content_encoding, "br");
    assert_eq!(&answer.body[..], b"\x0b\x02\x80{}\x03");
    let log = lab
        .process()
        .log_line("cannot decode exchange answer; forwarding it undecoded")
        .await;
    assert_eq!(log["level"], "WARN");
    // 2,000 zeros: python3 -c "import gzip,base64; print(gzip.compress(b'0'*2000, mtime=0).hex())"
    let bomb = "1f8b080000000000020333301805a360148c8251300a46c15007001d55f97ed0070000";
    let bomb: Vec<u8> = (0..bomb.len() / 2)
        .map(|n| u8::from_str_radix(&bomb[2 * n..2 * n + 2], 16).unwrap())
        .collect();
    exchange.answer(ORDERS, encoded("gzip", &bomb));
    let error = bot.send(spot_order("bomb")).await.unwrap_err();
    assert!(
        error.message().contains("more than 1024 bytes"),
        "{error:?}"
    );
    assert_eq!(refusal(Err(error)), lost());
}

fn lost() -> (Code, String, String) {
    let (reason, outcome) = ("ANSWER_LOST".to_owned(), "maybe_sent".to_owned());
    (Code::Unknown, reason, outcome)
}

#[tokio::test]
async fn retry_after_is_read_from_every_header_form_and_capped_at_one_hour() {
    let exchange = Exchange::start("spot").await;
    let lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    let body = r#"{"code":"429000","msg":"slow down"}"#;
    let with = |headers: &str| {
        let answer = http("429 Too Many Requests", body);
        answer
            .replacen("\r\n", &format!("\r\n{headers}\r\n"), 1)
            .into_bytes()
    };
    let reset = "gw-ratelimit-limit: 1\r\ngw-ratelimit-remaining: 0\r\ngw-ratelimit-reset: 18446744073709551615";
    for (number, (answer, wait_ms)) in [
        (field_case("429-retry-after-date.http"), 20_000),
        (with("retry-after: 7"), 7000),
        (with("retry-after: 18446744073709551615"), 3_600_000),
        (with(reset), 3_600_000),
    ]
    .into_iter()
    .enumerate()
    {
        exchange.answer(ORDERS, answer);
        let answer = bot
            .send(spot_order(&format!("wait-{number}")))
            .await
            .unwrap();
        assert_eq!(answer.outcome(), Outcome::Rejected);
        assert_eq!(answer.retry_after_ms, Some(wait_ms), "{number}");
        if let Some(limit) = answer.rate_limit {
            assert_eq!(limit.reset_ms, 3_600_000);
        }
    }
}

#[tokio::test]
async fn answer_with_120_header_lines_is_read() {
    let exchange = Exchange::start("spot").await;
    let lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.bot("maker").await;
    exchange.answer(ORDERS, field_case("headers-120.http"));
    let answer = bot.send(spot_order("headers")).await.unwrap();
    assert_eq!(verdict(&answer), (Outcome::Accepted, "200000"));
}

#[tokio::test]
async fn order_is_maybe_sent_when_informational_responses_come_instead_of_its_answer() {
    const EARLY_HINTS: &str = "HTTP/1.1 103 Early Hints\r\n\r\n";
    let exchange = Exchange::start("spot").await;
    let lab = Lab::with(exchange.settings()).await;
    let mut bot = lab.patient_bot("maker").await;
    let accepted = ok(&json!({"code": "200000", "data": {"orderId": "1"}}));
    exchange.answer(ORDERS, EARLY_HINTS.repeat(10) + &accepted);
    let answer = bot.send(spot_order("hints-10")).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);

    // Without an end, as far as the broker reads. The default deadline and answer timeout are longer than the test waits.
    exchange.answer(ORDERS, EARLY_HINTS.repeat(1_000_000));
    let lost = bot.send(spot_order("hints-endless"));
    let lost = timeout(Duration::from_secs(8), lost).await.unwrap();
    let status = lost.unwrap_err();
    let (_, reason, outcome, _) = failure(&status);
    assert_eq!(
        (reason.as_str(), outcome.as_str()),
        ("ANSWER_LOST", "maybe_sent")
    );
    let text = "more than 10 informational responses (1xx) came instead of its answer";
    assert!(status.message().contains(text), "{status:?}");
    exchange.pass(ORDERS);
    bot.send(spot_order("hints-none")).await.unwrap();
    let connections = exchange.connections(ORDERS);
    assert_eq!(connections.len(), 3, "each order is sent once");
    assert_ne!(connections[1], connections[2], "its connection is closed");
}

#[tokio::test]
async fn answer_with_another_client_oid_is_discarded_and_its_connection_closed() {
    let exchange = Exchange::start("spot").await;
    let optional = "scope = \"spot-margin\"\nclient_oid = \"optional\"\n";
    let settings = Settings {
        rules: RULES.replace("scope = \"spot-margin\"\n", optional),
        ..exchange.settings()
    };
    let mut lab = Lab::with(settings).await;
    let mut bot = lab.bot("maker").await;
    let accepted = |client_oid: &str| {
        ok(&json!({"code": "200000", "data": {"orderId": "1", "clientOid": client_oid}}))
    };
    exchange.answer(ORDERS, accepted("mine-1"));
    let answer = bot.send(spot_order("mine-1")).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    exchange.answer(ORDERS, accepted("somebody-else"));
    let error: Status = bot.send(spot_order("mine-2")).await.unwrap_err();
    assert!(
        error.message().contains("has a different clientOid"),
        "{error:?}"
    );
    assert_eq!(refusal(Err(error)), lost());
    exchange.pass(ORDERS);
    let answer = bot.send(spot_order("mine-3")).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    let connections = exchange.connections(ORDERS);
    let (wrong, next) = (connections[1], connections[2]);
    assert_ne!(
        wrong, next,
        "the connection of the wrong answer must not be used again"
    );
    let line = lab
        .process()
        .log_line("answer has a different clientOid than the request; connection closed, outcome maybe_sent")
        .await;
    assert_eq!(line["level"], "ERROR");
    assert!(!lab.process().log().contains("somebody-else"));
    // The same for an order of a batch, and for a cancel by clientOid.
    let batch = |first: &str, second: &Value| {
        let symbol = "BTC-USDT";
        let mut orders = json!([{"clientOid": first, "symbol": symbol}, {"symbol": symbol}]);
        orders[1]["clientOid"] = second.clone();
        request(
            Scope::SpotMargin,
            Method::Post,
            "/api/v1/hf/orders/multi",
            &json!({"orderList": orders}).to_string(),
        )
    };
    let items = |first: &str, second: Value| {
        ok(
            &json!({"code": "200000", "data": [{"success": true, "orderId": "1", "clientOid": first}, second]}),
        )
    };
    exchange.answer(
        "/api/v1/hf/orders/multi",
        items("b-1", json!({"success": false, "failMsg": "no"})),
    );
    assert_eq!(
        bot.send(batch("b-1", &json!("b-2")))
            .await
            .unwrap()
            .outcome(),
        Outcome::Accepted
    );
    exchange.answer(
        "/api/v1/hf/orders/multi",
        items(
            "b-3",
            json!({"success": true, "orderId": "2", "clientOid": "c-9"}),
        ),
    );
    assert_eq!(refusal(bot.send(batch("b-3", &json!("b-4"))).await), lost());
    // An order without a clientOid gets one from the exchange; the exchange still answers with the clientOid `c-9`.
    exchange.answer(
        "/api/v1/hf/orders/multi",
        items(
            "b-5",
            json!({"success": true, "orderId": "2", "clientOid": "c-9"}),
        ),
    );
    let answer = bot.send(batch("b-5", &Value::Null)).await.unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted);
    assert_eq!(json_of(&answer)["data"][1]["orderId"], "2");
    let path = "/api/v1/hf/orders/client-order/mine-3";
    exchange.answer(
        path,
        ok(&json!({"code": "200000", "data": {"clientOid": "mine-1"}})),
    );
    let cancel = request(
        Scope::SpotMargin,
        Method::Delete,
        &format!("{path}?symbol=BTC-USDT"),
        "",
    );
    assert_eq!(refusal(bot.send(cancel).await), lost());
}

#[tokio::test]
async fn order_whose_client_oid_cannot_be_looked_up_later_is_rejected() {
    let lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let mut bot = lab.bot("maker").await;
    let malformed = || {
        let (reason, outcome) = ("REQUEST_MALFORMED".to_owned(), "not_sent".to_owned());
        (Code::InvalidArgument, reason, outcome)
    };
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/field-cases/requests/client-oids-without-a-lookup.jsonl");
    let cases = std::fs::read_to_string(file).unwrap();
    let cases: Vec<Value> = cases
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(cases.len(), 6);
    let text = |case: &Value, name: &str| case[name].as_str().unwrap().to_owned();
    let mut requests: Vec<_> = cases
        .iter()
        .map(|case| {
            request(
                Scope::SpotMargin,
                Method::Post,
                &text(case, "path"),
                &text(case, "body"),
            )
        })
        .collect();
    let numeric = r#"{"clientOid":42,"side":"buy","symbol":"BTC-USDT","type":"limit","price":"10000","size":"0.001"}"#;
    requests.push(request(Scope::SpotMargin, Method::Post, ORDERS, numeric));
    let batch = r#"{"orderList":[{"clientOid":"good"},{"clientOid":"not good"}]}"#;
    requests.push(request(
        Scope::SpotMargin,
        Method::Post,
        "/api/v1/hf/orders/multi",
        batch,
    ));
    for request in requests {
        let (path, body) = (request.path.clone(), request.body.clone());
        let error = bot
            .send(request)
            .await
            .expect_err(&format!("{path} {body:?}"));
        assert!(error.message().contains("clientOid"), "{error:?}");
        assert_eq!(refusal(Err(error)), malformed(), "{path} {body:?}");
    }
    let requested = lab.kucoin.received();
    assert!(
        requested.iter().all(ReceivedRequest::is_internal),
        "no request of the bot may be sent"
    );
}

#[tokio::test]
async fn existing_order_can_be_looked_up_and_cancelled_by_any_client_oid() {
    let lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let named = r#"{"clientOidsList":[{"symbol":"XBTUSDTM","clientOid":"run7:42"}]}"#;
    for (scope, method, target, body) in [
        (
            Scope::SpotMargin,
            Method::Delete,
            "/api/v1/stop-order/cancelOrderByClientOid?clientOid=run7:42",
            "",
        ),
        (
            Scope::Futures,
            Method::Get,
            "/api/v1/orders/byClientOid?clientOid=run7:42",
            "",
        ),
        (
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders/multi-cancel",
            named,
        ),
    ] {
        let answer = bot.send(request(scope, method, target, body)).await;
        answer.expect(target);
    }
    let requested = lab.kucoin.received();
    let of_bot = requested
        .iter()
        .filter(|request| !ReceivedRequest::is_internal(request));
    assert_eq!(of_bot.count(), 3);
}
