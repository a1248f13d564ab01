//! Well-formed requests that the rules do not grant.

use std::collections::BTreeSet;

use credbroker::proto::Method::{Delete, Get, Post};
use credbroker::proto::Scope::{Futures, SpotMargin, Unified};
use credbroker::proto::SignAndSendRequest;

use super::{
    Arena, CATALOGUE, Case, Expected, METHODS, SCOPES, case, denied, filled, method_of, on,
    parameter, scope_of,
};
use crate::harness::failure;

/// Endpoints for API keys of sub-accounts: by every method, scope and spelling, for the bot with the most grants.
pub(super) fn api_keys() -> Vec<Case> {
    let mut cases = Vec::new();
    for endpoint in CATALOGUE.iter().filter(|e| e["grantable"] == false) {
        let path = filled(endpoint, "x");
        let own = (scope_of(endpoint), method_of(endpoint));
        for (scope, method) in SCOPES.into_iter().flat_map(|s| METHODS.map(|m| (s, m))) {
            let message = if own == (Some(scope), method) {
                format!(
                    "{} creates, changes, returns or deletes API keys",
                    endpoint["id"].as_str().unwrap()
                )
            } else {
                String::new()
            };
            let request = on("treasury", scope, method, &path);
            cases.push(case(
                format!("{method:?} {path} in {scope:?}"),
                "banker",
                request,
                denied(message),
            ));
        }
    }
    // A path with several methods is listed once per endpoint: keep the case with the endpoint's own message.
    cases.sort_by_key(|case| {
        (
            case.label.clone(),
            matches!(&case.expected, Expected::Denied(message) if message.is_empty()),
        )
    });
    cases.dedup_by_key(|case| case.label.clone());
    for path in [
        "/api/v1/sub/API-KEY",
        "/api/v1/SUB/api-key",
        "/api/v1/sub/Api-Key",
        "/api/v1/sub/api_key",
        "/api/v1/sub/apikey",
        "/api/v1/sub/api-key.json",
        "/api/v1/sub/api-key.",
        "/api/v1/sub/api-key~",
        "/api/v1/sub/api-key/update.json",
        "/api/v1/sub/api-key/UPDATE",
        "/api/v2/sub/api-key",
        "/api/ua/v2/user/Create-Sub-Api-Key",
        "/api/ua/v3/user/sub-api-key",
    ] {
        for method in METHODS {
            let request = on("treasury", SpotMargin, method, path);
            cases.push(case(
                format!("{method:?} {path}"),
                "banker",
                request,
                denied("not in the catalogue"),
            ));
        }
    }
    cases
}

/// Endpoints that move money, return deposit addresses, administer accounts or open sessions are in no class.
pub(super) fn money() -> Vec<Case> {
    let named = |endpoint: &&serde_json::Value| {
        let risk = endpoint["risk"].as_str().unwrap();
        !super::CLASSES.contains(&risk) && endpoint["grantable"] != false
    };
    let mut cases = Vec::new();
    for endpoint in CATALOGUE.iter().filter(named) {
        let Some(scope) = scope_of(endpoint) else {
            continue;
        };
        let method = method_of(endpoint);
        let id = endpoint["id"].as_str().unwrap();
        let mut request = on("treasury", scope, method, &filled(endpoint, "67fe"));
        if method == Post {
            request.body = "{\"currency\":\"USDT\",\"amount\":\"1000000\"}".into();
        }
        cases.push(case(
            format!("{id} with grants of classes only"),
            "banker",
            request,
            denied(format!("no rule grants {id} to this bot")),
        ));
    }
    // `clerk` is granted withdrawals by POST, but nothing similar.
    for (method, path) in [
        (Post, "/api/v1/withdrawals"),
        (Delete, "/api/v1/withdrawals/67fe"),
        (Post, "/api/v3/withdrawals/67fe"),
        (Post, "/api/v3/Withdrawals"),
        (Post, "/api/v3/withdrawals.json"),
        (Delete, "/api/v3/withdrawals"),
        (Post, "/api/v3/accounts/universal-transfer"),
        (Post, "/api/v1/hf/orders"),
    ] {
        let request = on("treasury", SpotMargin, method, path);
        cases.push(case(
            format!("{method:?} {path} by clerk"),
            "clerk",
            request,
            denied("no rule grants"),
        ));
    }
    cases
}

/// Endpoints of another scope, and of a host that credbroker does not support.
pub(super) fn scopes_and_hosts() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |bot, scope, method, path: &str, message: &str| {
        let label = format!("{method:?} {path} in {scope:?} by {bot}");
        cases.push(case(
            label,
            bot,
            on("main", scope, method, path),
            denied(message),
        ));
    };
    for (scope, method, path, own_scope) in [
        (Futures, Post, "/api/v1/hf/orders", "spot-margin"),
        (Unified, Post, "/api/v1/hf/orders", "spot-margin"),
        (Unified, Get, "/api/v1/accounts", "spot-margin"),
        (Futures, Get, "/api/v1/accounts/67fe", "spot-margin"),
        (SpotMargin, Get, "/api/v1/account-overview", "futures"),
        (Unified, Get, "/api/v1/account-overview", "futures"),
        (SpotMargin, Get, "/api/v1/level2/depth20", "futures"),
        (SpotMargin, Delete, "/api/v3/orders", "futures"),
        (
            Unified,
            Delete,
            "/api/v1/hf/orders/cancelAll",
            "spot-margin",
        ),
        (SpotMargin, Get, "/api/ua/v2/user/api-key", "unified"),
        (Futures, Get, "/api/ua/v2/account/balance", "unified"),
        (SpotMargin, Post, "/api/ua/v2/asset/withdrawal", "unified"),
        (Futures, Post, "/api/v3/withdrawals", "spot-margin"),
    ] {
        let message = format!("belongs to scope {own_scope}, not to ");
        add("maker", scope, method, path, &message);
    }
    let broker = "is on KuCoin's host for exchange brokers, which credbroker does not support";
    for endpoint in CATALOGUE.iter().filter(|e| e["scope"].is_null()) {
        for scope in SCOPES {
            add(
                "maker",
                scope,
                method_of(endpoint),
                &filled(endpoint, "x"),
                broker,
            );
        }
    }
    // Bots with grants in one scope: the request is right, the grant is missing.
    for (bot, scope, method, path) in [
        ("futurist", SpotMargin, Post, "/api/v1/hf/orders"),
        ("futurist", SpotMargin, Get, "/api/v1/accounts"),
        ("futurist", Unified, Get, "/api/ua/v2/user/api-key"),
        ("unifier", SpotMargin, Get, "/api/v1/accounts"),
        ("unifier", Futures, Post, "/api/v1/orders"),
        ("spotter", Futures, Post, "/api/v1/orders"),
        ("spotter", Futures, Get, "/api/v1/timestamp"),
        ("spotter", SpotMargin, Get, "/api/v1/timestamp"),
        ("spotter", SpotMargin, Get, "/api/v1/accounts"),
        ("reader", SpotMargin, Post, "/api/v1/hf/orders"),
        ("reader", SpotMargin, Get, "/api/v1/timestamp"),
        ("onlooker", SpotMargin, Get, "/api/v1/accounts"),
        ("onlooker", SpotMargin, Post, "/api/v1/bullet-private"),
    ] {
        add(bot, scope, method, path, "no rule grants");
    }
    cases
}

/// Accounts that are not granted to the bot, and a bot that no rule names.
pub(super) fn accounts_and_bots() -> Vec<Case> {
    let mut cases = Vec::new();
    for bot in ["maker", "picky", "reader", "spotter"] {
        for account in [
            "other",
            "treasury",
            "archive",
            "nobody",
            "0",
            "main-",
            "main-1",
            "xmain",
            "mai",
            "x--------------------------------",
        ] {
            let account = account.get(..32).unwrap_or(account);
            let request = on(account, SpotMargin, Get, "/api/v1/accounts");
            let message = format!("account {account} is unknown or not granted to this bot");
            cases.push(case(
                format!("account {account} by {bot}"),
                bot,
                request,
                denied(message),
            ));
        }
    }
    for account in ["main", "nobody"] {
        let request = on(account, SpotMargin, Get, "/api/v1/timestamp");
        let message = format!("account {account} is unknown or not granted");
        cases.push(case(
            format!("account {account} by foreign"),
            "foreign",
            request,
            denied(message),
        ));
    }
    for (account, method, path) in [
        ("main", Get, "/api/v1/timestamp"),
        ("main", Post, "/api/v1/hf/orders"),
        ("nobody", Get, "/api/v1/accounts"),
        ("main", Delete, "/api/v1/sub/api-key"),
        ("main", Get, "/api/v9/nothing"),
    ] {
        let request = on(account, SpotMargin, method, path);
        let unknown =
            Expected::Unknown("no rule names bot spiffe://demo.test/bot/outsider".to_owned());
        cases.push(case(
            format!("{method:?} {path} on {account} by outsider"),
            "outsider",
            request,
            unknown,
        ));
    }
    cases
}

/// Markets that a site does not have, and writes on a read-only account.
pub(super) fn sites_and_read_only_accounts() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |bot, account: &str, scope, method, path: &str, message: &str| {
        let label = format!("{method:?} {path} in {scope:?} by {bot}");
        cases.push(case(
            label,
            bot,
            on(account, scope, method, path),
            denied(message),
        ));
    };
    for (scope, method, path) in [
        (Futures, Post, "/api/v1/orders"),
        (Futures, Get, "/api/v1/timestamp"),
        (Futures, Get, "/api/v1/account-overview"),
        (Unified, Get, "/api/ua/v2/user/api-key"),
    ] {
        add(
            "euro",
            "europe",
            scope,
            method,
            path,
            "site eu does not serve",
        );
        add(
            "turk",
            "turkey",
            scope,
            method,
            path,
            "site tr does not serve",
        );
    }
    for endpoint in CATALOGUE
        .iter()
        .filter(|e| e["product"] == "margin" && e["grantable"] != false)
    {
        add(
            "turk",
            "turkey",
            SpotMargin,
            method_of(endpoint),
            &filled(endpoint, "67fe"),
            "site tr does not serve",
        );
    }
    for (scope, method, path) in [
        (SpotMargin, Post, "/api/v1/hf/orders"),
        (SpotMargin, Delete, "/api/v1/hf/orders/67fe"),
        (SpotMargin, Post, "/api/v1/bullet-private"),
        (SpotMargin, Post, "/api/v3/position/update-user-leverage"),
        (SpotMargin, Post, "/api/v3/withdrawals"),
        (Futures, Post, "/api/v1/orders"),
        (Unified, Get, "/api/ua/v2/user/api-key"),
    ] {
        add("auditor", "archive", scope, method, path, "no rule grants");
    }
    cases
}

/// `explorer` is granted three endpoints outside the catalogue, and nothing that differs from them.
pub(super) fn near_misses_of_unlisted() -> Vec<Case> {
    let mut cases = Vec::new();
    for (bot, account, scope, method, path) in [
        (
            "explorer",
            "treasury",
            SpotMargin,
            Post,
            "/api/v9/new/Thing",
        ),
        (
            "explorer",
            "treasury",
            SpotMargin,
            Delete,
            "/api/v9/new/Thing",
        ),
        ("explorer", "treasury", Futures, Get, "/api/v9/new/Thing"),
        ("explorer", "treasury", Unified, Get, "/api/v9/new/Thing"),
        ("explorer", "treasury", SpotMargin, Get, "/api/v9/new/thing"),
        ("explorer", "treasury", SpotMargin, Get, "/API/v9/new/Thing"),
        (
            "explorer",
            "treasury",
            SpotMargin,
            Get,
            "/api/v9/new/Thing.json",
        ),
        (
            "explorer",
            "treasury",
            SpotMargin,
            Get,
            "/api/v9/new/Thing/x",
        ),
        (
            "explorer",
            "treasury",
            SpotMargin,
            Get,
            "/api/v9/new/Thing2",
        ),
        ("explorer", "treasury", SpotMargin, Get, "/api/v9/new/Thin"),
        ("explorer", "treasury", SpotMargin, Get, "/api/v9/new"),
        ("explorer", "treasury", SpotMargin, Get, "/v9/new/Thing"),
        (
            "explorer",
            "treasury",
            SpotMargin,
            Get,
            "/x/api/v9/new/Thing",
        ),
        ("explorer", "treasury", SpotMargin, Get, "/api/v1/accounts"),
        ("explorer", "treasury", Unified, Post, "/api/v1/accounts"),
        (
            "explorer",
            "treasury",
            Unified,
            Get,
            "/api/v1/accounts/67fe",
        ),
        ("explorer", "treasury", Futures, Get, "/api/v1/accounts"),
        ("explorer", "treasury", Futures, Post, "/api/v9/orders"),
        ("explorer", "treasury", Futures, Post, "/api/v9/orders.New"),
        ("explorer", "treasury", Futures, Get, "/api/v9/orders.new"),
        ("explorer", "main", SpotMargin, Get, "/api/v9/new/Thing"),
        ("banker", "treasury", SpotMargin, Get, "/api/v9/new/Thing"),
        ("banker", "treasury", Unified, Get, "/api/v1/accounts"),
        ("maker", "main", SpotMargin, Get, "/api/v9/new/Thing"),
    ] {
        let label = format!("{method:?} {path} in {scope:?} on {account} by {bot}");
        cases.push(case(
            label,
            bot,
            on(account, scope, method, path),
            denied(""),
        ));
    }
    // A path and parameters at the limits: denied, not malformed.
    let longest = SignAndSendRequest {
        query: vec![parameter("a", "b"); 100],
        ..on("main", SpotMargin, Get, &format!("/{}", "x".repeat(1023)))
    };
    cases.push(case(
        "the longest path",
        "maker",
        longest,
        denied("not in the catalogue"),
    ));
    cases
}

#[tokio::test]
async fn api_key_endpoints_are_denied_in_every_method_scope_and_spelling() {
    Arena::start().await.assert_denied(api_keys()).await;
}

#[tokio::test]
async fn endpoints_outside_the_classes_are_denied_unless_granted_by_name() {
    Arena::start().await.assert_denied(money()).await;
}

#[tokio::test]
async fn endpoints_of_another_scope_or_an_unsupported_host_are_denied() {
    Arena::start().await.assert_denied(scopes_and_hosts()).await;
}

#[tokio::test]
async fn ungranted_accounts_and_bots_without_rules_are_denied() {
    Arena::start()
        .await
        .assert_denied(accounts_and_bots())
        .await;
}

#[tokio::test]
async fn markets_missing_at_the_site_and_writes_on_read_only_accounts_are_denied() {
    Arena::start()
        .await
        .assert_denied(sites_and_read_only_accounts())
        .await;
}

#[tokio::test]
async fn unlisted_grant_allows_only_its_exact_endpoint() {
    Arena::start()
        .await
        .assert_denied(near_misses_of_unlisted())
        .await;
}

#[tokio::test]
async fn unknown_and_forbidden_accounts_get_the_same_error() {
    let mut arena = Arena::start().await;
    let mut seen = BTreeSet::new();
    for account in ["other", "treasury", "nobody"] {
        // Also for requests that are denied anyway: the account is checked first.
        for path in [
            "/api/v1/accounts",
            "/api/v1/sub/api-key",
            "/api/v9/x",
            "/api/v1/broker/nd/info",
        ] {
            let request = SignAndSendRequest {
                request_id: "same".to_owned(),
                ..on(account, SpotMargin, Get, path)
            };
            let status = arena.bot("maker").send(request).await.unwrap_err();
            let (code, reason, outcome, _) = failure(&status);
            let message = status.message().replace(account, "*");
            seen.insert(format!("{code:?} {reason} {outcome} {message}"));
        }
    }
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert!(arena.lab.kucoin.received().is_empty());
    arena.lab.stop().await;
}
