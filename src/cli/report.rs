//! What a test has found out about a key, for a person who may have to act on it at night.

use super::keys::common::words;
use super::printable;
use super::text::{Cell, Style, ago};
use crate::base::diagnosis::Severity;
use crate::proto::{Finding, KeyFacts, Probe, TestKeyResponse};

const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// What is known, what was asked, and what is wrong.
pub(super) fn report(style: Style, account: &str, test: &TestKeyResponse, now_ms: i64) -> String {
    let head = format!(
        "{}/{}, for {}\n",
        printable(account),
        printable(&test.key),
        words(test.scopes()).join(", ")
    );
    let mut rows = Vec::new();
    let mut row = |name: Cell, text: &str| rows.push(vec![name, printable(text).into()]);
    if let Some(facts) = &test.facts {
        for (name, text) in known(facts, now_ms) {
            row(name.into(), &text);
        }
    }
    row("tested from".into(), &test.egress_ip);
    for Probe {
        question,
        is_ok,
        answer,
    } in &test.probes
    {
        let level = if *is_ok {
            Severity::Ok
        } else {
            Severity::Failed
        };
        row(
            Cell::of(level, level.as_str()),
            &format!("{question}: {answer}"),
        );
    }
    for Finding {
        is_refusal,
        cause,
        fix,
        ..
    } in &test.findings
    {
        let level = if *is_refusal {
            Cell::of(Severity::Failed, "refused")
        } else {
            Cell::of(Severity::Warning, Severity::Warning.as_str())
        };
        row(level, cause);
        row(Cell::default(), &format!("fix: {fix}"));
    }
    head + &style.table(&rows)
}

/// Whether something was found for which the key must not be used.
pub(super) fn is_refused(test: &TestKeyResponse) -> bool {
    test.findings.iter().any(|finding| finding.is_refusal)
}

fn known(facts: &KeyFacts, now_ms: i64) -> Vec<(&'static str, String)> {
    let or = |text: &str, unknown: &str| if text.is_empty() { unknown } else { text }.to_owned();
    let whose = if facts.is_master {
        "master account".to_owned()
    } else {
        format!("sub-account {}", or(&facts.sub_name, "without a name"))
    };
    let uid = or(&facts.uid, "not told");
    let site = or(&facts.site, "not told");
    let age = match facts.created_at_ms {
        0 => "age not told".to_owned(),
        at_ms => format!("made {}", ago(now_ms - at_ms)),
    };
    let end = match facts.expires_at_ms {
        0 => "does not expire".to_owned(),
        at_ms if at_ms <= now_ms => format!("expired {}", ago(now_ms - at_ms)),
        at_ms => format!("expires in {} days", (at_ms - now_ms) / DAY_MS),
    };
    let version = match facts.key_version {
        0 => "not told".to_owned(),
        version => version.to_string(),
    };
    vec![
        ("account", format!("uid {uid}, {whose}, site {site}")),
        ("permissions", or(&facts.permissions.join(", "), "none")),
        (
            "IP restriction",
            or(
                &facts.ip_whitelist.join(", "),
                "none: any address may use it",
            ),
        ),
        ("key", format!("API key version {version}, {age}, {end}")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::Scope;

    #[test]
    fn a_report_fits_a_terminal_and_says_cause_and_fix() {
        let facts = KeyFacts {
            uid: "1001".to_owned(),
            sub_name: "desk7".to_owned(),
            site: "global".to_owned(),
            permissions: vec!["General".to_owned(), "Withdrawal".to_owned()],
            key_version: 3,
            created_at_ms: 1,
            expires_at_ms: 40 * DAY_MS + 1,
            ..KeyFacts::default()
        };
        let finding = |is_refusal, cause: &str| Finding {
            name: "x".to_owned(),
            is_refusal,
            cause: cause.to_owned(),
            fix: "Untick Withdrawal under API Management > Edit > API permissions.".to_owned(),
        };
        let test = TestKeyResponse {
            facts: Some(facts),
            probes: vec![Probe {
                question: "GET /api/v1/accounts (spot-margin)".to_owned(),
                is_ok: false,
                answer: "400007 \u{1b}[2Jno".to_owned(),
            }],
            findings: vec![finding(true, "The key has it."), finding(false, "Look.")],
            scopes: vec![Scope::SpotMargin.into(), Scope::Futures.into()],
            key: "main".to_owned(),
            egress_ip: "203.0.113.7".to_owned(),
            ..TestKeyResponse::default()
        };
        assert!(is_refused(&test));
        let expected = "\
desk/main, for spot-margin, futures
account         uid 1001, sub-account desk7, site global
permissions     General, Withdrawal
IP restriction  none: any address may use it
key             API key version 3, made 10 days ago, expires in 30 days
tested from     203.0.113.7
failed          GET /api/v1/accounts (spot-margin): 400007 \\u{1b}[2Jno
refused         The key has it.
                fix: Untick Withdrawal under API Management > Edit > API
                permissions.
warning         Look.
                fix: Untick Withdrawal under API Management > Edit > API
                permissions.
";
        let told = report(Style::plain(), "desk", &test, 10 * DAY_MS + 1);
        assert_eq!(told, expected);
    }
}
