//! The keys: what Vault gave, tried on the exchange.

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

/// A key that Vault gave.
pub(super) struct Found {
    pub(super) account: AccountId,
    pub(super) name: KeyName,
    pub(super) version: u64,
    pub(super) key: Arc<Key>,
}

impl Found {
    pub(super) fn about(&self) -> String {
        format!("{}/{}", self.account, self.name)
    }
}

pub(super) fn late(about: &str, limit: Duration) -> Vec<Diagnosis> {
    let detail = format!(
        "not tested: the exchange did not answer within {} s",
        limit.as_secs()
    );
    vec![Diagnosis::unchecked("key", detail).about(about)]
}

/// Asks the exchange about a key, with the key itself; each request is audited.
pub(super) async fn test(broker: &Arc<Broker>, found: Found) -> Vec<Diagnosis> {
    let (check, about) = ("key", found.about());
    let Some((account, scopes)) = broker.served(&found.account, &found.name) else {
        return Vec::new();
    };
    let digest = KeyDigest(found.key.id_sha256());
    if let Some(revoked) = broker.restrictions.revoked(digest) {
        let detail = format!(
            "version {}: {} has revoked it",
            found.version,
            revoked.by.as_str()
        );
        let fix = format!(
            "register another one: `credbroker keys rotate {} --key {}`",
            found.account, found.name
        );
        return vec![Diagnosis::failed(check, detail, fix).about(&about)];
    }
    let tested = broker
        .test_key(&KeyTest {
            who: Principal::Broker,
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
            let detail = format!("version {version} in Vault is not tested: {reason}");
            lines.push(Diagnosis::unchecked(check, detail).about(&about));
        }
        // They say it all.
        Verdict::Good | Verdict::Refused(_) if has_findings => {}
        Verdict::Good => {
            let info = report.info.map(|info| described(&info, broker));
            let info = info.unwrap_or_default();
            let detail = format!("works (version {version} in Vault){info}");
            lines.push(Diagnosis::ok(check, detail).about(&about));
        }
        Verdict::Refused(reason) => {
            let fix = "look at the key on KuCoin's page, API Management";
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
        None => "any address may use it".to_owned(),
    };
    format!("; {}; {whitelist}", permissions.join(", "))
}
