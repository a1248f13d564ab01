//! The report of a key test.

use super::keys::common::words;
use super::printable;
use super::text::{Cell, Style, ago};
use crate::base::diagnosis::Severity;
use crate::proto::{Finding, KeyInfo, RequestResult, TestKeyResponse};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// Facts about the key, the requests of the test, and the findings.
pub(super) fn report(style: Style, account: &str, test: &TestKeyResponse, now_ms: i64) -> String {
    let head = format!(
        "{}/{}, tested for {}\n",
        printable(account),
        printable(&test.key),
        words(test.scopes()).join(", ")
    );
    let mut rows = Vec::new();
    let mut row = |name: Cell, text: &str| rows.push(vec![name, printable(text).into()]);
    if let Some(info) = &test.info {
        for (name, text) in fact_rows(info, now_ms) {
            row(name.into(), &text);
        }
    }
    row("tested from".into(), &test.egress_ip);
    for RequestResult {
        request,
        is_ok,
        result,
    } in &test.requests
    {
        let level = if *is_ok {
            Severity::Ok
        } else {
            Severity::Failed
        };
        row(
            Cell::of(level, level.as_str()),
            &format!("{request}: {result}"),
        );
    }
    for Finding {
        is_error,
        cause,
        fix,
        ..
    } in &test.findings
    {
        let level = if *is_error {
            Cell::of(Severity::Failed, "refused")
        } else {
            Cell::of(Severity::Warning, Severity::Warning.as_str())
        };
        row(level, cause);
        row(Cell::default(), &format!("fix: {fix}"));
    }
    head + &style.table(&rows)
}

/// Whether a finding forbids using the key.
pub(super) fn is_refused(test: &TestKeyResponse) -> bool {
    test.findings.iter().any(|finding| finding.is_error)
}

fn fact_rows(info: &KeyInfo, now_ms: i64) -> Vec<(&'static str, String)> {
    let or = |text: &str, unknown: &str| if text.is_empty() { unknown } else { text }.to_owned();
    let owner = if info.is_master {
        "master account".to_owned()
    } else {
        format!("sub-account {}", or(&info.sub_name, "(no name)"))
    };
    let uid = or(&info.uid, "unknown");
    let site = or(&info.site, "unknown");
    let age = match info.created_at_ms {
        0 => "creation date unknown".to_owned(),
        at_ms => format!("created {}", ago(now_ms - at_ms)),
    };
    let expiry = match info.expires_at_ms {
        0 => "does not expire".to_owned(),
        at_ms if at_ms <= now_ms => format!("expired {}", ago(now_ms - at_ms)),
        at_ms => format!("expires in {} days", (at_ms - now_ms) / DAY_MS),
    };
    let version = match info.key_version {
        0 => "unknown".to_owned(),
        version => version.to_string(),
    };
    vec![
        ("account", format!("uid {uid}, {owner}, site {site}")),
        ("permissions", or(&info.permissions.join(", "), "none")),
        (
            "IP restriction",
            or(
                &info.ip_whitelist.join(", "),
                "none (any address may use the key)",
            ),
        ),
        ("key", format!("API key version {version}, {age}, {expiry}")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Scope;

    #[test]
    fn report_fits_a_terminal_and_shows_cause_and_fix() {
        let info = KeyInfo {
            uid: "1001".to_owned(),
            sub_name: "desk7".to_owned(),
            site: "global".to_owned(),
            permissions: vec!["General".to_owned(), "Withdrawal".to_owned()],
            key_version: 3,
            created_at_ms: 1,
            expires_at_ms: 40 * DAY_MS + 1,
            ..KeyInfo::default()
        };
        let finding = |is_error, cause: &str| Finding {
            name: "x".to_owned(),
            is_error,
            cause: cause.to_owned(),
            fix: "Untick Withdrawal under API Management > Edit > API permissions.".to_owned(),
        };
        let test = TestKeyResponse {
            info: Some(info),
            requests: vec![RequestResult {
                request: "GET /api/v1/accounts (spot-margin)".to_owned(),
                is_ok: false,
                result: "400007 \u{1b}[2Jno".to_owned(),
            }],
            findings: vec![finding(true, "The key has it."), finding(false, "Look.")],
            scopes: vec![Scope::SpotMargin.into(), Scope::Futures.into()],
            key: "main".to_owned(),
            egress_ip: "203.0.113.7".to_owned(),
            ..TestKeyResponse::default()
        };
        assert!(is_refused(&test));
        let expected = "\
desk/main, tested for spot-margin, futures
account         uid 1001, sub-account desk7, site global
permissions     General, Withdrawal
IP restriction  none (any address may use the key)
key             API key version 3, created 10 days ago, expires in 30 days
tested from     203.0.113.7
failed          GET /api/v1/accounts (spot-margin): 400007 \\u{1b}[2Jno
refused         The key has it.
                fix: Untick Withdrawal under API Management > Edit > API
                permissions.
warning         Look.
                fix: Untick Withdrawal under API Management > Edit > API
                permissions.
";
        let shown = report(Style::plain(), "desk", &test, 10 * DAY_MS + 1);
        assert_eq!(shown, expected);
    }
}
