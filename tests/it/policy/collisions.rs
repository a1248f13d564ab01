//! Literal paths that a template also matches: `cancelAll` is never an order id, in any spelling.

use credbroker::proto::Method::{self, Delete, Get};
use credbroker::proto::Scope::{self, Futures, SpotMargin};

use super::{Arena, Case, case, denied, on};

/// Literal paths that a granted template also matches: scope, method, folder, literal, endpoint id.
const COLLISIONS: [(Scope, Method, &str, &str, &str); 14] = [
    (
        Futures,
        Delete,
        "/api/v1/orders/",
        "multi-cancel",
        "futures.delete.v1-orders-multi-cancel",
    ),
    (
        Futures,
        Get,
        "/api/v1/contracts/",
        "active",
        "futures.get.v1-contracts-active",
    ),
    (
        Futures,
        Get,
        "/api/v1/orders/",
        "byClientOid",
        "futures.get.v1-orders-by-client-oid",
    ),
    (
        Futures,
        Get,
        "/api/v2/contracts/",
        "active",
        "futures.get.v2-contracts-active",
    ),
    (
        SpotMargin,
        Delete,
        "/api/v1/hf/orders/",
        "cancelAll",
        "spot.delete.v1-hf-orders-cancel-all",
    ),
    (
        SpotMargin,
        Delete,
        "/api/v1/stop-order/",
        "cancel",
        "spot.delete.v1-stop-order-cancel",
    ),
    (
        SpotMargin,
        Delete,
        "/api/v1/stop-order/",
        "cancelOrderByClientOid",
        "spot.delete.v1-stop-order-cancel-order-by-client-oid",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/accounts/",
        "ledgers",
        "spot.get.v1-accounts-ledgers",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/accounts/",
        "transferable",
        "spot.get.v1-accounts-transferable",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/hf/orders/",
        "active",
        "spot.get.v1-hf-orders-active",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/hf/orders/",
        "done",
        "spot.get.v1-hf-orders-done",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/stop-order/",
        "queryOrderByClientOid",
        "spot.get.v1-stop-order-query-order-by-client-oid",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/withdrawals/",
        "quotas",
        "spot.get.v1-withdrawals-quotas",
    ),
    (
        SpotMargin,
        Get,
        "/api/v3/market/orderbook/",
        "level2",
        "spot.get.v3-market-orderbook-level2",
    ),
];

/// Literal paths of another method that a granted template also matches: scope, method of the request, folder, literal,
/// endpoint id and the method of that endpoint.
const OTHER_METHODS: [(Scope, Method, &str, &str, &str, &str); 9] = [
    (
        Futures,
        Delete,
        "/api/v1/orders/",
        "multi",
        "futures.post.v1-orders-multi",
        "POST",
    ),
    (
        Futures,
        Delete,
        "/api/v1/orders/",
        "byClientOid",
        "futures.get.v1-orders-by-client-oid",
        "GET",
    ),
    (
        Futures,
        Get,
        "/api/v1/orders/",
        "multi-cancel",
        "futures.delete.v1-orders-multi-cancel",
        "DELETE",
    ),
    (
        SpotMargin,
        Delete,
        "/api/v1/hf/orders/",
        "active",
        "spot.get.v1-hf-orders-active",
        "GET",
    ),
    (
        SpotMargin,
        Delete,
        "/api/v1/hf/orders/",
        "dead-cancel-all",
        "spot.post.v1-hf-orders-dead-cancel-all",
        "POST",
    ),
    (
        SpotMargin,
        Delete,
        "/api/v1/orders/",
        "multi",
        "spot.post.v1-orders-multi",
        "POST",
    ),
    (
        SpotMargin,
        Delete,
        "/api/v1/stop-order/",
        "queryOrderByClientOid",
        "spot.get.v1-stop-order-query-order-by-client-oid",
        "GET",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/hf/orders/",
        "cancelAll",
        "spot.delete.v1-hf-orders-cancel-all",
        "DELETE",
    ),
    (
        SpotMargin,
        Get,
        "/api/v1/stop-order/",
        "cancel",
        "spot.delete.v1-stop-order-cancel",
        "DELETE",
    ),
];

/// `picky` has grants only for templates: a literal path is another endpoint, and its lookalikes are not order ids.
pub(super) fn collisions() -> Vec<Case> {
    let mut cases = Vec::new();
    for (scope, method, folder, literal, id) in COLLISIONS {
        let upper = literal.to_ascii_uppercase();
        let (first, rest) = literal.split_at(1);
        let title = format!("{}{rest}", first.to_ascii_uppercase());
        let exact = on("main", scope, method, &format!("{folder}{literal}"));
        cases.push(case(
            format!("{literal} under the template's grant"),
            "picky",
            exact,
            denied(format!("no rule grants {id} to this bot")),
        ));
        for like in [
            upper.clone(),
            title,
            format!("{literal}.json"),
            format!("{literal}."),
            format!("{upper}.x.y"),
        ] {
            let request = on("main", scope, method, &format!("{folder}{like}"));
            // The template of level2 is `level{level}`, which other spellings of `level` do not match.
            let message = if literal == "level2" && !like.starts_with("level") {
                "not in the catalogue".to_owned()
            } else {
                format!("the path resembles {folder}{literal} but is spelled differently")
            };
            cases.push(case(
                format!("{like} for {literal}"),
                "picky",
                request,
                denied(message),
            ));
        }
    }
    for (scope, method, folder, literal, id, own_method) in OTHER_METHODS {
        cases.push(case(
            format!("{method:?} {folder}{literal}, which is a {own_method}"),
            "picky",
            on("main", scope, method, &format!("{folder}{literal}")),
            denied(format!(
                "this is the fixed path of {id} ({own_method}), so its last segment is not read as an id"
            )),
        ));
        let upper = literal.to_ascii_uppercase();
        for like in [upper.clone(), format!("{literal}.json"), upper + "."] {
            cases.push(case(
                format!("{method:?} {folder}{like}, which resembles a {own_method}"),
                "picky",
                on("main", scope, method, &format!("{folder}{like}")),
                denied(format!(
                    "the path resembles {folder}{literal} but is spelled differently"
                )),
            ));
        }
    }
    // Lookalikes are denied even to a bot that is granted both endpoints.
    for path in [
        "/api/v1/hf/orders/CancelAll",
        "/api/v1/hf/orders/cancelall.do",
    ] {
        let request = on("main", SpotMargin, Delete, path);
        cases.push(case(
            format!("{path} by maker"),
            "maker",
            request,
            denied("resembles"),
        ));
    }
    // A different spelling of the folder is not an endpoint.
    for path in [
        "/API/v1/hf/orders/cancelAll",
        "/api/v1/HF/orders/67fe",
        "/api/v1/hf/orders.x/67fe",
    ] {
        let request = on("main", SpotMargin, Delete, path);
        cases.push(case(
            format!("{path} by maker"),
            "maker",
            request,
            denied("not in the catalogue"),
        ));
    }
    cases
}

#[tokio::test]
async fn template_grant_does_not_allow_literal_paths_or_their_lookalikes() {
    Arena::start().await.assert_denied(collisions()).await;
}
