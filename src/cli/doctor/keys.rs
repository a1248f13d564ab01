//! Tests on the exchange the keys that Vault returned.

use std::sync::Arc;
use std::time::Duration;

use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, KeyName, Principal};
use crate::broker::Broker;
use crate::keyring::key_test::Verdict;
use crate::kucoin::Key;
use crate::kucoin::key_info::KeyInfo;
use crate::ops::key_test::KeyTest;
use crate::restrictions::KeyDigest;

/// A key that Vault returned.
pub(super) struct FoundKey {
    pub(super) account: AccountId,
    pub(super) name: KeyName,
    pub(super) version: u64,
    pub(super) key: Arc<Key>,
}

impl FoundKey {
    pub(super) fn about(&self) -> String {
        format!("{}/{}", self.account, self.name)
    }
}

pub(super) fn timed_out(about: &str, limit: Duration) -> Vec<Diagnosis> {
    let detail = format!(
        "not tested: no response from the exchange within {} s",
        limit.as_secs()
    );
    vec![Diagnosis::unchecked("key", detail).about(about)]
}

/// Tests a key on the exchange with requests that it signs; each request is audited.
pub(super) async fn test(broker: &Arc<Broker>, found: FoundKey) -> Vec<Diagnosis> {
    let (check, about) = ("key", found.about());
    let Some((account, scopes)) = broker.served(&found.account, &found.name) else {
        return Vec::new();
    };
    let digest = KeyDigest(found.key.id_sha256());
    if let Some(revoked) = broker.restrictions.revoked(digest) {
        let detail = format!(
            "version {} was revoked by {}",
            found.version,
            revoked.by.as_str()
        );
        let fix = format!(
            "register another key: `credbroker keys rotate {} --key {}`",
            found.account, found.name
        );
        return vec![Diagnosis::failed(check, detail, fix).about(&about)];
    }
    let tested = broker
        .test_key(&KeyTest {
            principal: Principal::Broker,
            account,
            scopes,
            key: found.key,
            reads: false,
            orders: false,
        })
        .await;
    let report = tested.report;
    let findings = report.findings.into_iter();
    let mut lines: Vec<_> = findings
        .map(|finding| {
            Diagnosis {
                id: check,
                ..finding
            }
            .about(&about)
        })
        .collect();
    let version = found.version;
    let has_findings = !lines.is_empty();
    match report.verdict {
        Verdict::Unclear(reason) => {
            let detail = format!("version {version} in Vault was not tested: {reason}");
            lines.push(Diagnosis::unchecked(check, detail).about(&about));
        }
        // The findings already say it.
        Verdict::Good | Verdict::Refused(_) if has_findings => {}
        Verdict::Good => {
            let info = report.info.map(|info| described(&info, broker));
            let info = info.unwrap_or_default();
            let detail = format!("works (version {version} in Vault){info}");
            lines.push(Diagnosis::ok(check, detail).about(&about));
        }
        Verdict::Refused(reason) => {
            let fix = "check the key on KuCoin's API Management page";
            lines.push(Diagnosis::failed(check, reason, fix).about(&about));
        }
    }
    lines
}

fn described(info: &KeyInfo, broker: &Broker) -> String {
    let permissions: Vec<_> = info.permissions.iter().map(ToString::to_string).collect();
    let address = broker.proof.expected();
    let whitelist = match info.admits(address) {
        Some(true) => format!("{address} is on its whitelist"),
        Some(false) => format!("{address} is not on its whitelist"),
        None => "no IP restriction: any address may use it".to_owned(),
    };
    format!("; permissions {}; {whitelist}", permissions.join(", "))
}
