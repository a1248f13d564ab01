//! Every fault, and whether the order was placed.

use std::time::{Duration, Instant};

use credbroker_sim::kucoin::{Fault, FaultAction, Host, Matching, Signature, When};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::client::Client;

#[tokio::test]
async fn faults_hit_before_or_after_the_order_is_placed() {
    let client = Client::start().await;
    let path = "/api/v1/hf/orders";
    let mut number = 0;
    let mut placed = 0;
    for (action, places) in [
        (
            FaultAction::Close {
                when: When::BeforeProcessing,
            },
            false,
        ),
        (
            FaultAction::Close {
                when: When::AfterProcessing,
            },
            true,
        ),
        (FaultAction::CutShort { bytes: 10 }, true),
        (
            FaultAction::Html {
                status: 502,
                when: When::BeforeProcessing,
            },
            false,
        ),
        (
            FaultAction::Html {
                status: 502,
                when: When::AfterProcessing,
            },
            true,
        ),
        (answered(When::BeforeProcessing), false),
        (answered(When::AfterProcessing), true),
        (FaultAction::Oversized { megabytes: 2 }, true),
        (
            FaultAction::RateLimited {
                reset_ms: Some(1500),
            },
            false,
        ),
        (FaultAction::RateLimited { reset_ms: None }, false),
        (FaultAction::OneByteChunks { kilobytes: 2 }, true),
    ] {
        number += 1;
        placed += usize::from(places);
        client.sim.fault(Fault::once(path, action.clone()));
        let order = json!({
            "clientOid": format!("o{number}"), "symbol": "BTC-USDT", "side": "buy", "price": "1", "size": "1",
        });
        let answer = client.try_call(Host::Spot, "POST", path, &order).await;
        let label = format!("{action:?}: {answer:?}");
        match action {
            FaultAction::Close { .. } => assert!(answer.is_none(), "{label}"),
            FaultAction::CutShort { bytes } => {
                let answer = answer.unwrap();
                assert_eq!((answer.body.len(), answer.is_complete()), (bytes, false));
            }
            FaultAction::Html { status, .. } => {
                let answer = answer.unwrap();
                assert_eq!((answer.status, answer.json()), (status, Value::Null));
                assert!(
                    answer
                        .header("content-type")
                        .unwrap()
                        .starts_with("text/html")
                );
            }
            FaultAction::Answer { status, body, .. } => {
                let answer = answer.unwrap();
                assert_eq!((answer.status, answer.json()), (status, body));
            }
            FaultAction::RateLimited { reset_ms } => {
                let answer = answer.unwrap();
                assert_eq!((answer.status, answer.code()), (429, "429000".to_owned()));
                let reset = reset_ms.map(|ms| ms.to_string());
                assert_eq!(answer.header("gw-ratelimit-reset"), reset);
            }
            FaultAction::OneByteChunks { .. } => {
                let body = String::from_utf8(answer.unwrap().body).unwrap();
                let mut lines = body.split("\r\n");
                assert!(body.len() > 6 * 2000 && body.ends_with("\r\n0\r\n\r\n"));
                assert_eq!((lines.next(), lines.next()), (Some("1"), Some("{")));
            }
            _ => {
                let answer = answer.unwrap();
                assert!(answer.is_complete() && answer.body.len() > 2_000_000);
            }
        }
        assert_eq!(client.sim.orders(7).len(), placed, "{label}");
        let received = client.sim.received().pop().unwrap();
        assert!(received.fault && received.signature == Signature::Verified);
        assert_eq!(received.code().is_some(), places);
        assert_eq!(received.created.len(), usize::from(places));
    }
}

fn answered(when: When) -> FaultAction {
    FaultAction::Answer {
        status: 500,
        body: json!({"code": "500000", "msg": "internal"}),
        when,
    }
}

#[tokio::test]
async fn answer_can_have_the_ids_of_another_order() {
    let client = Client::start().await;
    let path = "/api/v1/hf/orders";
    client
        .sim
        .fault(Fault::once(path, FaultAction::OtherOrder {}));
    let order = json!({"clientOid": "mine", "symbol": "BTC-USDT", "side": "buy", "price": "1", "size": "1"});
    let data = client.spot("POST", path, order).await.data();
    assert_eq!(data["clientOid"], "of-another-order");
    assert_eq!(data["orderId"], "599999999999999999");
    assert_eq!(client.sim.orders(7)[0].client_oid.as_deref(), Some("mine"));
}

#[tokio::test]
async fn faults_delay_and_stall_only_matching_requests() {
    let client = Client::start().await;
    let path = "/api/v1/timestamp";
    client.sim.fault(Fault {
        host: Some(Host::Spot),
        method: Some("GET".to_owned()),
        path: "/api/v1/time".to_owned(),
        matching: Matching::Prefix,
        skip: 1,
        times: None,
        action: FaultAction::Delay { ms: 60 },
    });
    let started = Instant::now();
    client.futures("GET", path, Value::Null).await.data();
    client.spot("GET", path, Value::Null).await.data();
    assert!(!client.sim.received().iter().any(|request| request.fault));
    client.spot("GET", path, Value::Null).await.data();
    assert!(started.elapsed() >= Duration::from_millis(60));
    client.sim.clear_faults();
    for when in [When::BeforeProcessing, When::AfterProcessing] {
        client.sim.fault(Fault::once(
            "/api/v1/hf/orders",
            FaultAction::Stall { when },
        ));
        let order = json!({"symbol": "BTC-USDT", "side": "buy", "price": "1", "size": "1"});
        let call = client.try_call(Host::Spot, "POST", "/api/v1/hf/orders", &order);
        let patience = Duration::from_millis(200);
        assert!(tokio::time::timeout(patience, call).await.is_err());
        let placed = usize::from(when == When::AfterProcessing);
        assert_eq!(client.sim.orders(7).len(), placed);
    }
}

#[tokio::test]
async fn held_request_is_processed_once_the_faults_are_removed() {
    let client = Client::start().await;
    let path = "/api/v1/hf/orders";
    client.sim.fault(Fault {
        times: None,
        ..Fault::once(path, FaultAction::Hold {})
    });
    let order = json!({"symbol": "BTC-USDT", "side": "buy", "price": "1", "size": "1"});
    let mut held = Box::pin(client.try_call(Host::Spot, "POST", path, &order));
    let patience = Duration::from_millis(200);
    assert!(tokio::time::timeout(patience, &mut held).await.is_err());
    assert!(client.sim.orders(7).is_empty());
    client.sim.clear_faults();
    assert_eq!(held.await.unwrap().status, 200);
    assert_eq!(client.sim.orders(7).len(), 1);
}

#[tokio::test]
async fn early_hints_come_without_end_and_the_order_is_not_placed() {
    let client = Client::start().await;
    let path = "/api/v1/hf/orders";
    client
        .sim
        .fault(Fault::once(path, FaultAction::EarlyHints {}));
    let mut stream = TcpStream::connect(client.url(Host::Spot).split_once("//").unwrap().1)
        .await
        .unwrap();
    let request = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut hints = vec![0; 1_000_000];
    stream.read_exact(&mut hints).await.unwrap();
    let hints = String::from_utf8(hints).unwrap();
    let mut heads = hints.split("\r\n\r\n").collect::<Vec<_>>();
    heads.pop();
    assert!(heads.len() > 1000 && heads.iter().all(|head| head.starts_with("HTTP/1.1 103 ")));
    assert!(client.sim.orders(7).is_empty());
}
