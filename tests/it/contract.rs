//! The API for bots: requests, answers and errors.

use std::collections::BTreeSet;

use credbroker::proto::{Method, Outcome, QueryParameter, Scope, SignAndSendRequest};
use credbroker_sim::installation::{MAIN_UID, Settings, kv_path};
use credbroker_sim::kucoin::{Fault, FaultAction, SimKey};
use tonic::Code;
use tonic_types::StatusExt;

use crate::answers::Exchange;
use crate::harness::{
    Lab, accounts, failure, futures_order, json_of, refusal, request, spot_order, until,
};

#[tokio::test]
async fn a_bot_places_looks_up_and_cancels_a_spot_order() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let placed = bot.send(spot_order("spot-1")).await.unwrap();
    assert_eq!(
        (placed.http_status, placed.code.as_str()),
        (200, "200000"),
        "{placed:?}"
    );
    assert_eq!(placed.outcome(), Outcome::Accepted);
    assert!(placed.content_type.starts_with("application/json"));
    assert!(placed.timestamp_ms > 1_700_000_000_000);
    let found = "/api/v1/hf/orders/client-order/spot-1?symbol=BTC-USDT";
    let found = bot
        .send(request(Scope::SpotMargin, Method::Get, found, ""))
        .await
        .unwrap();
    assert_eq!(json_of(&found)["data"]["clientOid"], "spot-1");
    assert_eq!(json_of(&found)["data"]["active"], true);
    let cancel = "/api/v1/hf/orders/client-order/spot-1?symbol=BTC-USDT";
    let cancelled = bot
        .send(request(Scope::SpotMargin, Method::Delete, cancel, ""))
        .await
        .unwrap();
    assert_eq!(cancelled.outcome(), Outcome::Accepted);
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn a_bot_places_looks_up_and_cancels_a_futures_order() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let placed = bot.send(futures_order("futures-1")).await.unwrap();
    assert_eq!(placed.outcome(), Outcome::Accepted, "{placed:?}");
    let order_id = json_of(&placed)["data"]["orderId"]
        .as_str()
        .unwrap()
        .to_owned();
    let by_oid = request(
        Scope::Futures,
        Method::Get,
        "/api/v1/orders/byClientOid?clientOid=futures-1",
        "",
    );
    let found = bot.send(by_oid).await.unwrap();
    assert_eq!(json_of(&found)["data"]["id"], order_id.as_str());
    let cancel = request(
        Scope::Futures,
        Method::Delete,
        &format!("/api/v1/orders/{order_id}"),
        "",
    );
    assert_eq!(bot.send(cancel).await.unwrap().outcome(), Outcome::Accepted);
    assert_eq!(lab.stop().await, 0);
}

#[tokio::test]
async fn denied_request_gets_policy_denied_and_nothing_is_sent() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("reader").await;
    let denied = refusal(bot.send(spot_order("never")).await);
    assert_eq!(
        denied,
        (
            Code::PermissionDenied,
            "POLICY_DENIED".to_owned(),
            "not_sent".to_owned()
        )
    );
    assert!(lab.kucoin.received().is_empty());
    lab.stop().await;
}

#[tokio::test]
async fn rejection_by_the_exchange_comes_with_advice() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let accepted = bot.send(accounts()).await.unwrap();
    assert_eq!(accepted.advice, "");
    lab.kucoin.add_key(SimKey {
        permissions: Vec::new(),
        ..SimKey::fake(MAIN_UID)
    });
    let refused = bot.send(futures_order("not-allowed")).await.unwrap();
    assert_eq!(refused.code, "400007", "{refused:?}");
    assert_eq!(
        refused.advice,
        "This API key lacks a permission that the request needs. The permission is not ticked for the key. If the key should be allowed to do this, tick the permission Futures under API Management > Edit > API permissions."
    );
    lab.kucoin.add_key(SimKey {
        ip_whitelist: vec!["192.0.2.1".parse().unwrap()],
        ..SimKey::fake(MAIN_UID)
    });
    let refused = bot.send(accounts()).await.unwrap();
    assert_eq!(refused.code, "400006", "{refused:?}");
    assert!(
        refused
            .advice
            .contains("Add 127.0.0.1 to the key's addresses under API Management"),
        "{}",
        refused.advice
    );
    lab.stop().await;
}

#[tokio::test]
async fn every_invalid_field_of_a_request_is_reported() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let call = SignAndSendRequest {
        account: "Main".to_owned(),
        scope: 7,
        method: Method::Get.into(),
        path: "/api//v1".to_owned(),
        query: vec![QueryParameter {
            name: String::new(),
            value: "x".to_owned(),
        }],
        body: "{}".into(),
        request_id: "a b".to_owned(),
        not_after_ms: 0,
        resolve_ms: 30_001,
    };
    let error = bot.send(call).await.unwrap_err();
    let (code, reason, outcome, id) = failure(&error);
    assert_eq!(
        (code, reason.as_str(), outcome.as_str()),
        (Code::InvalidArgument, "REQUEST_MALFORMED", "not_sent")
    );
    assert_eq!(id.len(), 32, "the broker must generate a request id");
    let fields: BTreeSet<_> = error
        .get_details_bad_request()
        .unwrap()
        .field_violations
        .into_iter()
        .map(|v| v.field)
        .collect();
    let expected = [
        "account",
        "body",
        "path",
        "request_id",
        "resolve_ms",
        "scope",
    ];
    assert_eq!(
        fields.iter().map(String::as_str).collect::<Vec<_>>(),
        expected
    );
    lab.stop().await;
}

#[tokio::test]
async fn largest_allowed_body_is_accepted_and_one_byte_more_is_rejected() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    let body = |bytes: usize| format!("{{\"remark\":\"{}\"}}", "x".repeat(bytes - 13));
    let test = |bytes| {
        request(
            Scope::SpotMargin,
            Method::Post,
            "/api/v1/hf/orders/test",
            &body(bytes),
        )
    };
    assert!(bot.send(test(128 * 1024)).await.is_ok());
    let error = bot.send(test(128 * 1024 + 1)).await.unwrap_err();
    assert!(
        error
            .message()
            .contains("expected at most 131072 bytes, got 131073"),
        "{}",
        error.message()
    );
    lab.stop().await;
}

#[tokio::test]
async fn response_and_metrics_contain_the_duration_of_each_stage() {
    let mut lab = Lab::start().await;
    let mut bot = lab.bot("maker").await;
    lab.kucoin.fault(Fault::once(
        "/api/v1/accounts",
        FaultAction::Delay { ms: 80 },
    ));
    let mut call = accounts();
    call.request_id = "timed".to_owned();
    let answer = bot.send(call).await.unwrap();
    let timing = answer.timing.unwrap();
    assert!(timing.exchange_us >= 80_000, "{timing:?}");
    assert!(timing.signing_us > 0, "{timing:?}");
    assert_eq!(answer.request_id, "timed");
    let received = lab.kucoin.received();
    assert_eq!(
        received[0].header("kc-api-timestamp"),
        Some(answer.timestamp_ms.to_string().as_str())
    );
    assert_eq!(
        received[0].header("user-agent"),
        Some(concat!("credbroker/", env!("CARGO_PKG_VERSION")))
    );
    let (_, metrics) = lab.get("/metrics").await;
    let line =
        "credbroker_requests_total{scope=\"spot-margin\",outcome=\"accepted\",reason=\"\"} 1";
    assert!(metrics.contains(line), "{metrics}");
    assert!(
        metrics.contains("credbroker_stage_duration_seconds_count{stage=\"exchange\"} 1"),
        "{metrics}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn grpc_health_status_follows_readiness() {
    let mut lab = Lab::start().await;
    let channel = lab
        .endpoint(&lab.ca.bot("maker").unwrap())
        .connect()
        .await
        .unwrap();
    let client = tonic_health::pb::health_client::HealthClient::new(channel);
    let status = async |service: &str| {
        let service = service.to_owned();
        let request = tonic_health::pb::HealthCheckRequest { service };
        client
            .clone()
            .check(request)
            .await
            .unwrap()
            .into_inner()
            .status
    };
    let (serving, not_serving) = (1, 2);
    for service in ["", "credbroker.v1.Broker"] {
        until("health is serving", async || {
            status(service).await == serving
        })
        .await;
    }
    assert_eq!(lab.get("/healthz").await, (200, "ok\n".to_owned()));
    assert_eq!(lab.get("/readyz").await, (200, "ready\n".to_owned()));
    assert_eq!(lab.get("/nothing").await.0, 404);
    for account in ["main", "other"] {
        lab.vault.delete_metadata("kv", &kv_path(account, "main"));
    }
    until("health is not serving", async || {
        status("credbroker.v1.Broker").await == not_serving
    })
    .await;
    let (code, reasons) = lab.get("/readyz").await;
    assert_eq!(code, 503);
    assert!(
        reasons.contains("key main/main: not available: Vault has no such key (404)"),
        "{reasons}"
    );
    lab.stop().await;
}

#[tokio::test]
async fn reflection_lists_the_services() {
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    };
    let mut lab = Lab::start().await;
    let channel = lab
        .endpoint(&lab.ca.bot("maker").unwrap())
        .connect()
        .await
        .unwrap();
    let mut client = ServerReflectionClient::new(channel);
    let reflection_request = |message| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(message),
    };
    let requests = tokio_stream::iter([reflection_request(MessageRequest::ListServices(
        String::new(),
    ))]);
    let mut answers = client
        .server_reflection_info(requests)
        .await
        .unwrap()
        .into_inner();
    let Some(MessageResponse::ListServicesResponse(list)) =
        answers.message().await.unwrap().unwrap().message_response
    else {
        panic!("no list")
    };
    let names: BTreeSet<_> = list
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for name in ["credbroker.v1.Broker", "grpc.health.v1.Health"] {
        assert!(names.contains(name), "{names:?}");
    }
    lab.stop().await;
}

#[tokio::test]
async fn largest_answer_reaches_a_client_with_default_settings() {
    // The default of egress.max_answer_bytes.
    const LARGEST: usize = 4_000_000;
    let exchange = Exchange::start("spot").await;
    let mut lab = Lab::with(Settings {
        process: false,
        ..exchange.settings()
    })
    .await;
    // Every other field as long as it can be: 64 and 8192 characters of 4 bytes, and almost 64 KiB of headers.
    let long = |chars| "\u{1f980}".repeat(chars);
    let start = format!(
        "{{\"code\":\"{}\",\"msg\":\"{}\",\"data\":\"",
        long(64),
        long(8192)
    );
    let answer = |length: usize| {
        let data = "x".repeat(length - start.len() - 2);
        let kind = "t".repeat(60_000);
        let most = u64::MAX;
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/{kind}\r\ncontent-length: {length}\r\nretry-after: {most}\r\n\
             gw-ratelimit-limit: {most}\r\ngw-ratelimit-remaining: {most}\r\ngw-ratelimit-reset: {most}\r\n\r\n\
             {start}{data}\"}}"
        )
    };
    exchange.answer("/api/v1/accounts", answer(LARGEST));
    let mut bot = lab.bot("maker").await;
    let mut request = accounts();
    request.request_id = "r".repeat(64);
    let received = bot.send(request).await.unwrap();
    assert_eq!(received.body.len(), LARGEST);
    assert_eq!(received.msg, long(8192));
    assert!(received.content_type.len() > 60_000 && received.code.len() == 256);
    exchange.answer("/api/v1/accounts", answer(LARGEST + 1));
    let refused = bot.send(accounts()).await.map(drop).unwrap_err();
    let text = format!("its answer has more than {LARGEST} bytes");
    assert!(refused.message().contains(&text), "{refused:?}");
    lab.stop().await;
}
