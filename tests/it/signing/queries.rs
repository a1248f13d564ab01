//! Random paths and queries, signed by the broker and verified by the simulator from the request that arrived.

use credbroker::proto::{Method, QueryParameter, Scope, SignAndSendRequest};
use credbroker_sim::kucoin::Signature;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::harness::{Lab, request};

const CASES: u32 = 400;

/// Text with many reserved characters and without control characters.
fn text(least: usize) -> impl Strategy<Value = String> {
    let character = prop_oneof![
        3 => prop::sample::select("&=#+% ?/:;@,!$'()*[]{}|\\^`\"<>~._-".chars().collect::<Vec<_>>()),
        3 => "[a-zA-Z0-9]".prop_map(|text| text.chars().next().unwrap()),
        2 => any::<char>().prop_filter("a control character", |c| !c.is_control()),
    ];
    prop::collection::vec(character, least..12).prop_map(String::from_iter)
}

/// Private endpoints, with random path parameters.
fn targets() -> impl Strategy<Value = (Scope, Method, String)> {
    let segment = "[A-Za-z0-9._~-]{1,24}".prop_filter("no dot segment", |s| s != "." && s != "..");
    prop_oneof![
        Just((
            Scope::SpotMargin,
            Method::Get,
            "/api/v1/accounts".to_owned()
        )),
        Just((
            Scope::SpotMargin,
            Method::Delete,
            "/api/v1/hf/orders/cancelAll".to_owned()
        )),
        Just((
            Scope::Unified,
            Method::Get,
            "/api/ua/v2/user/api-key".to_owned()
        )),
        segment.clone().prop_map(|s| (
            Scope::SpotMargin,
            Method::Get,
            format!("/api/v1/isolated/account/{s}")
        )),
        segment.clone().prop_map(|s| (
            Scope::SpotMargin,
            Method::Delete,
            format!("/api/v1/hf/orders/{s}")
        )),
        segment.prop_map(|s| (Scope::Futures, Method::Get, format!("/api/v1/orders/{s}"))),
    ]
}

#[test]
fn signatures_verify_for_any_query_and_its_parameters_arrive_unchanged() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let mut lab = runtime.block_on(Lab::start());
    let maker = runtime.block_on(lab.bot("maker"));
    let mut runner = TestRunner::new(Config {
        cases: CASES,
        failure_persistence: None,
        ..Config::default()
    });
    let queries = prop::collection::vec((text(1), text(0)), 0..6);
    let result = runner.run(&(targets(), queries), |((scope, method, path), query)| {
        let sent = SignAndSendRequest {
            path: path.clone(),
            query: query
                .iter()
                .cloned()
                .map(|(name, value)| QueryParameter { name, value })
                .collect(),
            ..request(scope, method, "", "")
        };
        let before = lab.kucoin.received().len();
        let answer = runtime.block_on(maker.clone().send(sent));
        prop_assert!(answer.is_ok(), "{:?}", answer);
        let received = lab.kucoin.received();
        prop_assert_eq!(received.len(), before + 1);
        let arrived = &received[before];
        prop_assert_eq!(&arrived.signature, &Signature::Verified);
        prop_assert_eq!(arrived.path(), path);
        let raw_query = arrived
            .target
            .split_once('?')
            .map_or("", |(_, query)| query);
        prop_assert!(raw_query.bytes().all(|b| b.is_ascii_graphic()));
        let pairs: Vec<_> = url::form_urlencoded::parse(raw_query.as_bytes())
            .into_owned()
            .collect();
        prop_assert_eq!(pairs, query);
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    assert!(lab.kucoin.received().len() >= CASES as usize);
    runtime.block_on(lab.stop());
}
