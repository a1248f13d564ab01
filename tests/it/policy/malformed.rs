//! Malformed requests: the error names exactly the invalid fields.

use bytes::Bytes;
use credbroker::proto::{Method, Scope, SignAndSendRequest};

use super::{Arena, Case, Expected, case, malformed, on, parameter};

fn read() -> SignAndSendRequest {
    on("main", Scope::SpotMargin, Method::Get, "/api/v1/accounts")
}

fn order(body: impl Into<Bytes>) -> SignAndSendRequest {
    SignAndSendRequest {
        body: body.into(),
        ..on("main", Scope::SpotMargin, Method::Post, "/api/v1/hf/orders")
    }
}

/// Paths with empty or dot segments, or without a slash at the start.
const TRAVERSAL: &[&str] = &[
    "",
    "/",
    "//",
    "///",
    ".",
    "..",
    "api/v1/accounts",
    "./api/v1/accounts",
    "/./api/v1/accounts",
    "/../api/v1/accounts",
    "/api/v1/./accounts",
    "/api/v1/../v1/accounts",
    "/api/v1/accounts/.",
    "/api/v1/accounts/..",
    "/api/v1/hf/orders/../../sub/api-key",
    "/api/v1/accounts/",
    "/api/v1/accounts//",
    "/api//v1/accounts",
    "/api/v1//accounts",
    "/api/v1/accounts/x/",
];

/// Paths with percent-encoding or braces.
const ENCODED: &[&str] = &[
    "/api/v1/%61ccounts",
    "/api/v1/%2e/accounts",
    "/api/%2e%2e/v1/accounts",
    "/api/%2E%2E/v1/accounts",
    "/api/.%2e/v1/accounts",
    "/api/%252e%252e/v1/accounts",
    "/api%2fv1%2faccounts",
    "/api/v1/accounts%2F..%2Fsub%2Fapi-key",
    "/api/v1%5caccounts",
    "/api/v1/accounts%00",
    "/api/v1/accounts%20",
    "/api/v1/accounts%0d%0aKC-API-KEY:%20x",
    "/api/v1/accounts%3ftype=trade",
    "/api/v1/accounts%23",
    "/api/v1/accounts%",
    "/api/v1/accounts%zz",
    "/api/v1/accounts%u002e",
    "/api/v1/%c0%ae%c0%ae/accounts",
    "/api/v1/accounts/{accountId}",
];

/// Paths with a host, port or scheme.
const HOSTS: &[&str] = &[
    "//evil.example",
    "//evil.example/api/v1/accounts",
    "///evil.example/api/v1/accounts",
    "/\\evil.example/api/v1/accounts",
    "\\\\evil.example\\api",
    "@evil.example/api/v1/accounts",
    ":pass@evil.example/api/v1/accounts",
    "/@evil.example/api/v1/accounts",
    ":8443/api/v1/accounts",
    ".evil.example/api/v1/accounts",
    "evil.example/api/v1/accounts",
    "http://evil.example/api/v1/accounts",
    "https://api.kucoin.com/api/v1/accounts",
    "HTTPS://evil.example",
    "/http://evil.example/api/v1/accounts",
    "file:///etc/passwd",
    "*",
    "evil.example:443",
];

/// Paths with characters that are not allowed in a segment.
const CHARACTERS: &[&str] = &[
    "/api/v1/accounts?type=trade",
    "/api/v1/accounts?",
    "?",
    "/api/v1/accounts#x",
    "#",
    "/api/v1/accounts;jsessionid=1",
    "/api/v1/..;/sub/api-key",
    "/api/v1/;/accounts",
    "/api/v1\\accounts",
    "/api/v1/..\\accounts",
    " /api/v1/accounts",
    "/api/v1/accounts ",
    "/api/v1/acc ounts",
    "\t/api/v1/accounts",
    "/api/v1/accounts\t",
    "/api/v1/accounts\n",
    "/api/v1/accounts\r",
    "/api/v1/accounts\r\nKC-API-KEY: stolen",
    "/api/v1/accounts HTTP/1.1\r\nHost: evil.example\r\n\r\nGET /api/v1/accounts",
    "/api/v1/accounts\0",
    "\0/api/v1/accounts",
    "/api/v1/accounts\u{7f}",
    "/api/v1/accounts\u{85}",
    "/api/v1/accounts\u{1b}[2J",
    "/api/v1/accöunts",
    "／api／v1／accounts",
    "/api/v1/ａccounts",
    "/api/v1/․․/accounts",
    "/api/v1/accounts\u{200b}",
    "/api/v1/accounts\u{202e}",
    "\u{feff}/api/v1/accounts",
    "/api/v1/accounts\u{2028}",
    "/api/v1/accounts/a+b",
    "/api/v1/accounts/a!b",
    "/api/v1/accounts/$b",
    "/api/v1/accounts/a&b",
    "/api/v1/accounts/a'b",
    "/api/v1/accounts/(b)",
    "/api/v1/accounts/a,b",
    "/api/v1/accounts/a=b",
    "/api/v1/accounts/a:b",
    "/api/v1/accounts/a|b",
    "/api/v1/accounts/a\"b",
    "/api/v1/accounts/<b>",
    "/api/v1/accounts/^b",
    "/api/v1/accounts/`b`",
    "/api/v1/accounts/[b]",
];

/// Bodies that are not one JSON object or array, have duplicate names, or set the timestamp.
const BODIES: &[&str] = &[
    // Not JSON.
    "x",
    " ",
    "\0",
    "clientOid=a&side=buy",
    "<xml/>",
    "{",
    "[",
    "{]",
    "{}{}",
    "{},",
    "[]x",
    "{}\0",
    "{'a':1}",
    "{a:1}",
    "{\"a\":1,}",
    "[1,]",
    "{\"a\":NaN}",
    "{\"a\":Infinity}",
    "{\"a\":1e999}",
    "{\"a\":01}",
    "{\"a\":0x10}",
    "{\"a\":\"\\ud800\"}",
    "{\"a\":\"\n\"}",
    "{\"a\":\"b\r\nKC-API-KEY: stolen\"}",
    "{}\r\n\r\nGET /api/v1/accounts HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "/**/{}",
    "{} // x",
    "\u{feff}{}",
    "\u{b}{}",
    "\u{a0}{}",
    // JSON, but neither an object nor an array.
    "1",
    "null",
    "true",
    "\"x\"",
    "\"{}\"",
    // Duplicate names.
    "{\"side\":\"buy\",\"side\":\"sell\"}",
    "{\"side\":\"buy\",\"s\\u0069de\":\"sell\"}",
    "{\"a\":{\"b\":1,\"b\":1}}",
    "{\"orderList\":[{\"clientOid\":\"a\",\"clientOid\":\"b\"}]}",
    "[{},{\"\":1,\"\":2}]",
    "{\"__proto__\":1,\"__proto__\":2}",
    // A bot must not set the timestamp.
    "{\"clientTimestamp\":1735689600123}",
    "{\"clientTimestamp\":null}",
    "{\"allowMaxTimeWindow\":1000}",
    "{\"client\\u0054imestamp\":1}",
    "{\"\\u0063lientTimestamp\":1}",
    "{\"orderList\":[{\"a\":1},{\"clientTimestamp\":1}]}",
    "[[[{\"x\":{\"clientTimestamp\":1}}]]]",
    "{\"CLIENTTIMESTAMP\":1}",
    "{\"client_timestamp\":1}",
    "{\"client-Timestamp\":1}",
    "{\"clientTime\u{17f}tamp\":1}",
    "{\"clientTime\\u017ftamp\":1}",
    "{\"clientTimestamp\":1,\"clientTimestamp\":2}",
];

/// Invalid account names.
const ACCOUNTS: &[&str] = &[
    "",
    " ",
    "Main",
    "MAIN",
    " main",
    "main ",
    "main\0",
    "main\n",
    "main\r\n",
    "main\t",
    "-main",
    "ma in",
    "main/..",
    "../main",
    "..",
    ".",
    "main.",
    "main%00",
    "main;",
    "main?x=1",
    "main#",
    "*",
    "mäin",
    "ｍain",
    "main\u{200b}",
    "kv/data/main",
    "main\r\nKC-API-KEY: stolen",
    "maіn",
    "null\u{0}",
];

/// Invalid request ids.
const REQUEST_IDS: &[&str] = &[
    " ",
    "a b",
    "a/b",
    "../x",
    "a\0",
    "a\n",
    "a\r\nevent: outcome",
    "a\"",
    "{}",
    "é",
    "a%20b",
    "\u{202e}x",
    "<script>",
    "$(x)",
    "a:b",
];

/// Paths that are not in normal form, from a bot that can read `/api/v1/accounts`.
pub(super) fn paths() -> Vec<Case> {
    let long = format!("/api/v1/accounts/{}", "x".repeat(1024 - 16));
    let all = [TRAVERSAL, ENCODED, HOSTS, CHARACTERS, &[&long]].concat();
    let all = all.into_iter();
    all.map(|path| {
        let request = SignAndSendRequest {
            path: path.to_owned(),
            ..read()
        };
        case(
            format!("path {path:.60?}"),
            "maker",
            request,
            malformed("path"),
        )
    })
    .collect()
}

/// Invalid queries.
pub(super) fn queries() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |label: &str, pairs: &[(&str, &str)], fields: &[&str]| {
        let request = SignAndSendRequest {
            query: pairs
                .iter()
                .map(|(name, value)| parameter(name, value))
                .collect(),
            ..read()
        };
        let fields = fields.iter().map(|field| (*field).to_owned()).collect();
        let label = format!("query with {label}");
        cases.push(case(label, "maker", request, Expected::Malformed(fields)));
    };
    add("an empty name", &[("", "x")], &["query[0].name"]);
    add("an empty name and value", &[("", "")], &["query[0].name"]);
    add(
        "an empty name later",
        &[("a", "b"), ("", "x")],
        &["query[1].name"],
    );
    let controls = [
        "\0",
        "\n",
        "\r",
        "\t",
        "\u{8}",
        "\u{b}",
        "\u{1b}",
        "\u{7f}",
        "\u{80}",
        "\u{85}",
        "\u{9f}",
        "x\r\nKC-API-KEY: stolen",
        "x HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    ];
    for control in controls {
        add(
            &format!("{control:?} in a value"),
            &[("a", control)],
            &["query[0]"],
        );
        add(
            &format!("{control:?} in a name"),
            &[("a", "b"), (control, "c")],
            &["query[1]"],
        );
    }
    for name in [
        "clientTimestamp",
        "clienttimestamp",
        "CLIENTTIMESTAMP",
        "client_timestamp",
        "client-timestamp",
        "_clientTimestamp",
        "clientTime\u{17f}tamp",
        "cl\u{131}entTimestamp",
    ] {
        add(
            &format!("{name:?}"),
            &[("symbol", "BTC-USDT"), (name, "1")],
            &["query[1].name"],
        );
    }
    add("101 parameters", &[("a", "b"); 101], &["query"]);
    add(
        "a value that is too long",
        &[("a", &"x".repeat(8192))],
        &["query"],
    );
    add(
        "a name that is too long",
        &[(&"x".repeat(8193), "")],
        &["query"],
    );
    add(
        "a value within the limit in characters but not in bytes",
        &[("a", &"测".repeat(2731))],
        &["query"],
    );
    add(
        "too many parameters that are too long",
        &[("a", "x".repeat(100).as_str()); 101],
        &["query", "query"],
    );
    add(
        "clientTimestamp 100 times",
        &[("clientTimestamp", "1"); 100],
        &["query[0].name"],
    );
    cases
}

/// Invalid and ambiguous bodies, and bodies of requests that must not have one.
pub(super) fn bodies() -> Vec<Case> {
    let mut cases = Vec::new();
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    let name = "n".repeat(60_000);
    let long_name_twice = format!("{{\"{name}\":1,\"{name}\":2}}");
    let too_long = format!("{{\"a\":\"{}\"}}", "x".repeat(128 * 1024 - 7));
    for text in [BODIES, &[&deep, &long_name_twice, &too_long]].concat() {
        let request = order(text.to_owned());
        cases.push(case(
            format!("body {text:.60?}"),
            "maker",
            request,
            malformed("body"),
        ));
    }
    let raw: [&[u8]; 5] = [
        b"{\"a\":\"\xff\"}",
        b"\xff\xfe{\0}\0",
        b"{\"\xc0\xae\":1}",
        b"{\"a\":\"\xed\xa0\x80\"}",
        b"\x1f\x8b\x08\0",
    ];
    for bytes in raw {
        cases.push(case(
            format!("body {bytes:?}"),
            "maker",
            order(bytes.to_vec()),
            malformed("body"),
        ));
    }
    let without_body = [
        (Scope::SpotMargin, Method::Get, "/api/v1/accounts"),
        (Scope::Futures, Method::Get, "/api/v1/orders/multi-cancel"),
        (Scope::SpotMargin, Method::Delete, "/api/v1/hf/orders/67fe"),
        (
            Scope::SpotMargin,
            Method::Delete,
            "/api/v1/hf/orders/cancelAll",
        ),
        (
            Scope::SpotMargin,
            Method::Delete,
            "/api/v1/orders/multi-cancel",
        ),
        (
            Scope::Unified,
            Method::Delete,
            "/api/v1/orders/multi-cancel",
        ),
        (Scope::Futures, Method::Delete, "/api/v1/orders"),
        (Scope::Futures, Method::Delete, "/api/v1/orders/67fe"),
        (
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders/multi-cancel/x",
        ),
        (
            Scope::Futures,
            Method::Delete,
            "/api/v1/orders/Multi-Cancel",
        ),
        (
            Scope::Futures,
            Method::Delete,
            "/api/v2/orders/multi-cancel",
        ),
    ];
    for (scope, method, path) in without_body {
        let request = SignAndSendRequest {
            body: "{\"orderIdsList\":[\"1\"]}".into(),
            ..on("main", scope, method, path)
        };
        cases.push(case(
            format!("body on {method:?} {path} in {scope:?}"),
            "maker",
            request,
            malformed("body"),
        ));
    }
    cases
}

/// Invalid scopes, methods, accounts and request ids, and requests with all fields invalid.
pub(super) fn other_fields() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |label: String, field: &str, request| {
        cases.push(case(label, "maker", request, malformed(field)));
    };
    for number in [0, -1, 4, 99, i32::MAX, i32::MIN] {
        let scope = SignAndSendRequest {
            scope: number,
            ..read()
        };
        add(format!("scope {number}"), "scope", scope);
        let method = SignAndSendRequest {
            method: number,
            ..read()
        };
        add(format!("method {number}"), "method", method);
    }
    let long = "x".repeat(65);
    let huge = "\u{10ffff}".repeat(20_000);
    for name in [ACCOUNTS, &[&long, &huge]].concat() {
        let request = SignAndSendRequest {
            account: name.to_owned(),
            ..read()
        };
        add(format!("account {name:.40?}"), "account", request);
    }
    for id in [REQUEST_IDS, &[&long, &huge]].concat() {
        let request = SignAndSendRequest {
            request_id: id.to_owned(),
            ..read()
        };
        add(format!("request id {id:.40?}"), "request_id", request);
    }
    let everything = SignAndSendRequest {
        account: "../../main\r\n".to_owned(),
        scope: 99,
        method: 99,
        path: "//evil.example\r\nX: y".to_owned(),
        query: vec![parameter("a", "b")],
        body: "x\r\n".into(),
        request_id: "a\r\nb".to_owned(),
        not_after_ms: 0,
        resolve_ms: 0,
    };
    let fields = ["scope", "method", "account", "request_id", "path"].map(str::to_owned);
    cases.push(case(
        "all fields invalid",
        "maker",
        everything.clone(),
        Expected::Malformed(fields.to_vec()),
    ));
    let with_method = SignAndSendRequest {
        method: Method::Post.into(),
        ..everything
    };
    let fields = ["scope", "account", "request_id", "body", "path"].map(str::to_owned);
    cases.push(case(
        "all fields invalid except the method",
        "outsider",
        with_method,
        Expected::Malformed(fields.to_vec()),
    ));
    cases
}

#[tokio::test]
async fn paths_not_in_normal_form_are_malformed() {
    Arena::start().await.assert_denied(paths()).await;
}

#[tokio::test]
async fn queries_with_control_characters_empty_names_or_a_timestamp_are_malformed() {
    Arena::start().await.assert_denied(queries()).await;
}

#[tokio::test]
async fn bodies_that_are_misplaced_or_not_one_json_document_are_malformed() {
    Arena::start().await.assert_denied(bodies()).await;
}

#[tokio::test]
async fn unknown_scopes_and_methods_and_invalid_names_are_malformed() {
    Arena::start().await.assert_denied(other_fields()).await;
}
