//! Well-formed descriptors that the rules do not grant.

use std::collections::BTreeSet;

use credbroker::proto::Method::{Delete, Get, Post};
use credbroker::proto::Scope::{Futures, SpotMargin, Unified};
use credbroker::proto::SignAndSendRequest;

use super::{
    Arena, CATALOGUE, Case, Expect, METHODS, SCOPES, case, denied, filled, method_of, on,
    parameter, scope_of,
};
use crate::harness::failure;

/// API keys of sub-accounts: by every method, in every scope and spelling, of the bot with most rights.
pub(super) fn api_keys() -> Vec<Case> {
    let mut cases = Vec::new();
    for endpoint in CATALOGUE.iter().filter(|e| e["grantable"] == false) {
        let path = filled(endpoint, "x");
        let belongs = (scope_of(endpoint), method_of(endpoint));
        for (scope, method) in SCOPES.into_iter().flat_map(|s| METHODS.map(|m| (s, m))) {
            let says = if belongs == (Some(scope), method) {
                format!(
                    "{} makes, changes, returns or deletes API keys",
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
                denied(says),
            ));
        }
    }
    // The same path under several methods was listed once per endpoint: keep the one whose endpoint it is.
    cases.sort_by_key(|case| {
        (
            case.what.clone(),
            matches!(&case.expect, Expect::Denied(says) if says.is_empty()),
        )
    });
    cases.dedup_by_key(|case| case.what.clone());
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

/// Whatever moves money, names deposit addresses, administers accounts or hands out sessions is never in a class.
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
            format!("{id} with classes alone"),
            "banker",
            request,
            denied(format!("no rule grants {id} to this bot")),
        ));
    }
    // `clerk` may withdraw by POST, and do nothing that is near it.
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
            format!("{method:?} {path} of clerk"),
            "clerk",
            request,
            denied("no rule grants"),
        ));
    }
    cases
}

/// Endpoints of another scope, and of the host that is not served.
pub(super) fn scopes_and_hosts() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |bot, scope, method, path: &str, says: &str| {
        let what = format!("{method:?} {path} in {scope:?} of {bot}");
        cases.push(case(
            what,
            bot,
            on("main", scope, method, path),
            denied(says),
        ));
    };
    for (scope, method, path, belongs) in [
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
        let says = if belongs.is_empty() {
            String::new()
        } else {
            format!("belongs to scope {belongs}, not to ")
        };
        add("maker", scope, method, path, &says);
    }
    let broker = "is served by the host for exchange brokers, which credbroker does not serve";
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
    // Bots with one scope each, in a scope that is not theirs: the endpoint is right, the grant is missing.
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

/// Accounts that are not the bot's, and bots that are nobody's.
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
            let says = format!("account {account} is unknown or not granted to this bot");
            cases.push(case(
                format!("account {account} of {bot}"),
                bot,
                request,
                denied(says),
            ));
        }
    }
    for account in ["main", "nobody"] {
        let request = on(account, SpotMargin, Get, "/api/v1/timestamp");
        let says = format!("account {account} is unknown or not granted");
        cases.push(case(
            format!("account {account} of foreign"),
            "foreign",
            request,
            denied(says),
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
        let says =
            Expect::Unknown("no rule names the bot spiffe://demo.test/bot/stranger".to_owned());
        cases.push(case(
            format!("{method:?} {path} on {account} of stranger"),
            "stranger",
            request,
            says,
        ));
    }
    cases
}

/// What a site does not have, and what a read-only account does not do.
pub(super) fn sites_and_purposes() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |bot, account: &str, scope, method, path: &str, says: &str| {
        let what = format!("{method:?} {path} in {scope:?} of {bot}");
        cases.push(case(
            what,
            bot,
            on(account, scope, method, path),
            denied(says),
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

/// `explorer` has three endpoints outside the catalogue, and nothing that differs from them in anything.
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
        let what = format!("{method:?} {path} in {scope:?} on {account} of {bot}");
        cases.push(case(
            what,
            bot,
            on(account, scope, method, path),
            denied(""),
        ));
    }
    // As long as may be, and as many parameters as may be: judged, not malformed.
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
async fn api_keys_are_out_of_reach_by_every_method_scope_and_spelling() {
    Arena::start().await.refuses(api_keys()).await;
}

#[tokio::test]
async fn money_moves_for_nobody_who_holds_classes_alone() {
    Arena::start().await.refuses(money()).await;
}

#[tokio::test]
async fn a_scope_gives_nothing_of_another_scope_and_nothing_of_a_host_that_is_not_served() {
    Arena::start().await.refuses(scopes_and_hosts()).await;
}

#[tokio::test]
async fn an_account_of_others_and_a_bot_without_rules_get_nothing() {
    Arena::start().await.refuses(accounts_and_bots()).await;
}

#[tokio::test]
async fn a_site_without_the_market_and_a_read_only_account_refuse() {
    Arena::start().await.refuses(sites_and_purposes()).await;
}

#[tokio::test]
async fn an_endpoint_outside_the_catalogue_is_granted_to_the_letter() {
    Arena::start()
        .await
        .refuses(near_misses_of_unlisted())
        .await;
}

#[tokio::test]
async fn an_account_of_others_and_one_that_does_not_exist_look_the_same() {
    let mut arena = Arena::start().await;
    let mut seen = BTreeSet::new();
    for account in ["other", "treasury", "nobody"] {
        // Also for what would be refused otherwise: the account is judged first.
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
