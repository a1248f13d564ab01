//! What a bot can send outside the contract: undecodable bytes, unknown fields, headers.

use credbroker::proto::{Method, Scope, SignAndSendRequest, SignAndSendResponse};
use credbroker_sim::kucoin::{Host, Signature};
use prost::Message;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::{Arena, on};
use crate::harness::{Lab, failure, refusal};

/// The request as protobuf encoding allows it: any bytes for text, repeated fields, and unknown fields.
#[derive(Clone, PartialEq, Message)]
struct Loose {
    #[prost(bytes = "vec", repeated, tag = "1")]
    account: Vec<Vec<u8>>,
    #[prost(int64, tag = "2")]
    scope: i64,
    #[prost(int64, tag = "3")]
    method: i64,
    #[prost(bytes = "vec", repeated, tag = "4")]
    path: Vec<Vec<u8>>,
    #[prost(bytes = "vec", repeated, tag = "5")]
    query: Vec<Vec<u8>>,
    #[prost(bytes = "vec", tag = "6")]
    body: Vec<u8>,
    #[prost(bytes = "vec", tag = "7")]
    request_id: Vec<u8>,
    #[prost(string, tag = "15")]
    host: String,
    #[prost(string, repeated, tag = "16")]
    headers: Vec<String>,
}

fn loose() -> Loose {
    Loose {
        account: vec![b"main".to_vec()],
        scope: 1,
        method: 1,
        path: vec![b"/api/v1/accounts".to_vec()],
        ..Loose::default()
    }
}

async fn send<M: Message + Default + 'static>(
    channel: &Channel,
    message: M,
) -> Result<SignAndSendResponse, Status> {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let path = PathAndQuery::from_static("/credbroker.v1.Broker/SignAndSend");
    let codec = tonic_prost::ProstCodec::<M, SignAndSendResponse>::default();
    let answer = client.unary(Request::new(message), path, codec).await?;
    Ok(answer.into_inner())
}

async fn maker(lab: &Lab) -> Channel {
    let identity = lab.ca.bot("maker").unwrap();
    lab.endpoint(&identity).connect().await.unwrap()
}

#[tokio::test]
async fn invalid_utf_8_and_undecodable_messages_are_malformed() {
    /// Fields with types other than in the contract.
    #[derive(Clone, PartialEq, Message)]
    struct WrongTypes {
        #[prost(uint64, tag = "1")]
        account: u64,
        #[prost(string, tag = "3")]
        method: String,
    }
    let mut arena = Arena::start().await;
    let channel = maker(&arena.lab).await;
    let bad = b"/api/v1/acc\xc0\xafounts".to_vec();
    let messages = [
        Loose {
            account: vec![b"main\xff".to_vec()],
            ..loose()
        },
        Loose {
            path: vec![bad.clone()],
            ..loose()
        },
        Loose {
            request_id: b"\xff".to_vec(),
            ..loose()
        },
        // Query parameters whose name, value or encoding is invalid.
        Loose {
            query: vec![b"\x0a\x01\xff".to_vec()],
            ..loose()
        },
        Loose {
            query: vec![b"\x0a\x01a\x12\x02\xc0\xae".to_vec()],
            ..loose()
        },
        Loose {
            query: vec![b"\x0a\x7fa".to_vec()],
            ..loose()
        },
        Loose {
            query: vec![bad],
            ..loose()
        },
    ];
    let mut codes = Vec::new();
    for message in messages {
        codes.push(send(&channel, message).await.unwrap_err().code());
    }
    let wrong_types = WrongTypes {
        account: 7,
        method: "GET".to_owned(),
    };
    codes.push(send(&channel, wrong_types).await.unwrap_err().code());
    assert_eq!(codes, [Code::InvalidArgument; 8]);
    assert!(arena.lab.kucoin.received().is_empty());
    assert!(
        arena
            .lab
            .audit()
            .iter()
            .all(|line| line["reason"] == "REQUEST_MALFORMED")
    );
    assert_eq!(arena.lab.audit().len(), 8);
    arena.lab.stop().await;
}

#[tokio::test]
async fn oversized_message_is_rejected_and_nothing_is_sent() {
    let mut arena = Arena::start().await;
    let request = SignAndSendRequest {
        body: vec![b' '; 5 << 20].into(),
        ..on("main", Scope::SpotMargin, Method::Post, "/api/v1/hf/orders")
    };
    let status = arena.bot("maker").send(request).await.unwrap_err();
    assert_ne!(status.code(), Code::Ok);
    assert!(arena.lab.kucoin.received().is_empty());
    arena.lab.stop().await;
}

#[tokio::test]
async fn unknown_message_fields_cannot_set_host_or_headers() {
    let mut arena = Arena::start().await;
    let channel = maker(&arena.lab).await;
    let message = Loose {
        host: "evil.example".to_owned(),
        headers: vec!["kc-api-key: stolen".to_owned()],
        ..loose()
    };
    send(&channel, message).await.unwrap();
    let received = arena.lab.kucoin.received();
    assert_eq!(received.len(), 1);
    assert_eq!(
        (received[0].host, &received[0].signature),
        (Host::Spot, &Signature::Verified)
    );
    assert!(!format!("{received:?}").contains("evil"), "{received:?}");
    assert!(!format!("{received:?}").contains("stolen"), "{received:?}");
    arena.lab.stop().await;
}

#[tokio::test]
async fn rules_check_the_value_that_is_sent_when_a_field_is_repeated() {
    let mut arena = Arena::start().await;
    let channel = maker(&arena.lab).await;
    let (granted, denied) = (
        b"/api/v1/accounts".to_vec(),
        b"/api/v1/sub/api-key".to_vec(),
    );
    let (mine, other) = (b"main".to_vec(), b"other".to_vec());
    for twice in [
        Loose {
            path: vec![granted.clone(), denied.clone()],
            ..loose()
        },
        Loose {
            account: vec![mine.clone(), other.clone()],
            ..loose()
        },
    ] {
        assert_eq!(refusal(send(&channel, twice).await).1, "POLICY_DENIED");
    }
    assert!(arena.lab.kucoin.received().is_empty());
    let last_counts = Loose {
        path: vec![denied, granted],
        account: vec![other, mine],
        ..loose()
    };
    send(&channel, last_counts).await.unwrap();
    let received = arena.lab.kucoin.received();
    assert_eq!(received.len(), 1);
    assert_eq!(
        (received[0].path(), received[0].uid),
        ("/api/v1/accounts", Some(1001))
    );
    arena.lab.stop().await;
}

#[tokio::test]
async fn enum_values_out_of_range_are_malformed() {
    let mut arena = Arena::start().await;
    let channel = maker(&arena.lab).await;
    // The encoding has 64 bits, enums of the contract have 32: a larger value must not be cut to a valid one.
    for message in [
        Loose {
            scope: 1 << 40,
            ..loose()
        },
        Loose {
            method: 99,
            ..loose()
        },
        Loose {
            scope: -1,
            ..loose()
        },
    ] {
        let status = send(&channel, message).await.unwrap_err();
        assert_eq!(failure(&status).1, "REQUEST_MALFORMED");
    }
    assert!(arena.lab.kucoin.received().is_empty());
    arena.lab.stop().await;
}

#[tokio::test]
async fn metadata_of_the_bot_is_not_forwarded_to_the_exchange() {
    let mut arena = Arena::start().await;
    let mut request = Request::new(on(
        "main",
        Scope::SpotMargin,
        Method::Get,
        "/api/v1/accounts",
    ));
    for (name, value) in [
        ("kc-api-key", "stolen"),
        ("kc-api-sign", "stolen"),
        ("kc-api-partner", "stolen"),
        ("x-site-type", "stolen"),
        ("x-forwarded-host", "stolen"),
        ("x-forwarded-for", "10.0.0.1"),
        ("authorization", "stolen"),
        ("cookie", "stolen"),
    ] {
        request.metadata_mut().insert(name, value.parse().unwrap());
    }
    arena
        .bot("maker")
        .client
        .sign_and_send(request)
        .await
        .unwrap();
    let received = arena.lab.kucoin.received();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].signature, Signature::Verified);
    let mut names: Vec<_> = received[0]
        .headers
        .iter()
        .map(|(name, _)| name.as_str())
        .collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "accept-encoding",
            "content-type",
            "host",
            "kc-api-key",
            "kc-api-key-version",
            "kc-api-passphrase",
            "kc-api-sign",
            "kc-api-timestamp",
            "user-agent",
        ]
    );
    arena.lab.stop().await;
}
