//! Tests keys at the exchange, over the normal request path: reads the key's details, and checks that signed requests are
//! accepted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde_json::json;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, sleep};

use crate::audit::Act;
use crate::base::diagnosis::{Diagnosis, Severity};
use crate::base::ids::{AccountId, KeyName, Principal, RequestId};
use crate::base::outcome::Outcome;
use crate::base::text::clean;
use crate::broker::{Broker, BrokerError, Call, Receipt};
use crate::keyring::key_test::{KeyChange, KeyEvent, KeyTestRequest, Report, Verdict};
use crate::kucoin::code::{ACCOUNT_REFUSED, KEY_REFUSED, VERSION_OR_SECRET};
use crate::kucoin::key_info::{self, Expected, KeyInfo};
use crate::kucoin::{Key, KeyVersion, Method, Scope, Target, UnsignedRequest};
use crate::policy::{Account, Purpose};
use crate::restrictions::{KeyDigest, Revoked};

/// Time limit of one request.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// How many keys are tested at the same time in the background.
const AT_ONCE: usize = 8;

/// How often to check whether new rules name a key.
const CHECK_EVERY: Duration = Duration::from_millis(20);

/// A key to be tested.
#[derive(Debug)]
pub(crate) struct KeyTest {
    /// Who requested the test.
    pub(crate) principal: Principal,
    /// Its account in the rules.
    pub(crate) account: Arc<Account>,
    /// The scopes that the rules use it for.
    pub(crate) scopes: BTreeSet<Scope>,
    /// The key.
    pub(crate) key: Arc<Key>,
    /// Whether to test every scope with a read.
    pub(crate) reads: bool,
    /// Whether to send a test order in scopes that have an endpoint for it; no order is placed.
    pub(crate) orders: bool,
}

/// The result of a key test.
#[derive(Debug)]
pub(crate) struct KeyTestResult {
    /// Verdict, details and findings.
    pub(crate) report: Report,
    /// The requests and their results.
    pub(crate) checks: Vec<Check>,
}

/// One request and its result.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    /// The request.
    pub(crate) request: String,
    /// Whether the answer was as expected.
    pub(crate) is_ok: bool,
    /// The result in a few words; no balances.
    pub(crate) result: String,
}

/// Runs the keyring's key tests and audits the results. Never returns.
pub(crate) async fn run_key_tests(
    broker: Arc<Broker>,
    mut key_events: mpsc::UnboundedReceiver<KeyEvent>,
) {
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    while let Some(key_event) = key_events.recv().await {
        match key_event {
            KeyEvent::Changed(change) => broker.record(&change),
            KeyEvent::KeyTestRequest(key_test) => {
                tokio::spawn(Arc::clone(&broker).try_key(key_test, Arc::clone(&at_once)));
            }
        }
    }
}

impl Broker {
    async fn try_key(self: Arc<Self>, key_test: KeyTestRequest, at_once: Arc<Semaphore>) {
        let KeyTestRequest {
            account,
            name,
            key,
            is_candidate,
            mut tell,
        } = key_test;
        let test = async {
            // New rules that name it may be about to be loaded.
            let (account, scopes) = loop {
                match self.served(&account, &name) {
                    Some(served) => break served,
                    None => sleep(CHECK_EVERY).await,
                }
            };
            // A candidate is tested at once, since a rotation waits for it; other keys wait for a permit.
            let _permit = if is_candidate {
                None
            } else {
                at_once.acquire().await.ok()
            };
            let test = KeyTest {
                principal: Principal::Broker,
                account,
                scopes,
                key,
                reads: is_candidate,
                orders: false,
            };
            let report = self.test_key(&test).await.report;
            let info = report.info.as_ref().filter(|_| !is_candidate);
            if let Some(uid) = info.and_then(|info| info.uid.as_deref()) {
                for scope in &test.scopes {
                    self.orders.learn_uid(&test.account.id, *scope, uid);
                }
            }
            report
        };
        let report = tokio::select! {
            report = test => report,
            // The result is no longer needed: the key may have been replaced or removed.
            () = tell.closed() => return,
        };
        let _ = tell.send(report);
    }

    /// The account of a key and the scopes that use it; `None` if the rules do not name the key.
    pub(crate) fn served(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Option<(Arc<Account>, BTreeSet<Scope>)> {
        let policy = self.policy();
        let account = policy.accounts().find(|entry| entry.id == *account)?;
        let uses = account.keys.iter().filter(|(_, named)| *named == name);
        let scopes: BTreeSet<_> = uses.map(|(scope, _)| *scope).collect();
        (!scopes.is_empty()).then(|| (Arc::clone(account), scopes))
    }

    /// Tests a key whose KuCoin key version is unknown, starting with the newest, which KuCoin creates now. `make` builds the
    /// key for a version.
    ///
    /// # Errors
    /// The errors of `make`.
    pub(crate) async fn test_versions<E>(
        self: &Arc<Self>,
        test: KeyTest,
        make: impl Fn(KeyVersion) -> Result<Arc<Key>, E>,
    ) -> Result<(KeyTestResult, KeyVersion), E> {
        let newest = test.key.version();
        let reported = |tested: &KeyTestResult| match tested.report.info.as_ref()?.version? {
            2 => Some(KeyVersion::V2),
            3 => Some(KeyVersion::V3),
            _ => None,
        };
        let first = self.test_key(&test).await;
        let other = match reported(&first) {
            // The exchange accepted the key and reported its version.
            Some(version) if version == newest => return Ok((first, newest)),
            Some(version) => version,
            None if first.report.info.is_some() => return Ok((first, newest)),
            // KuCoin does not document how it rejects a key that is used with a wrong version.
            None if first.is_refused_for(&VERSION_OR_SECRET) => KeyVersion::V2,
            None => return Ok((first, newest)),
        };
        let key = make(other)?;
        let second = self.test_key(&KeyTest { key, ..test }).await;
        Ok(if second.report.info.is_some() {
            (second, other)
        } else {
            (first, newest)
        })
    }

    /// Requests the details of a key, then sends the other requests of the test.
    pub(crate) async fn test_key(self: &Arc<Self>, test: &KeyTest) -> KeyTestResult {
        let mut tested = KeyTestResult {
            report: Report {
                verdict: Verdict::Good,
                info: None,
                findings: Vec::new(),
            },
            checks: Vec::new(),
        };
        let digest = KeyDigest(test.key.id_sha256());
        if let Some(revoked) = self.restrictions.revoked(digest) {
            tested.add_finding(is_revoked(&revoked));
            return tested;
        }
        if !test.key.has_partner_key() && test.has_partner() {
            tested.add_finding(lacks_partner_key(&test.account));
        }
        let (scope, ask) = info_of(&test.scopes);
        let Some(body) = self.check(test, &mut tested, scope, ask).await else {
            return tested;
        };
        match KeyInfo::read(&body) {
            Ok(info) => {
                let judged = info.judge(&self.expected(test));
                let lacks = |f: &&Diagnosis| f.is_failed() && f.id == "permission-missing";
                if let Some(finding) = judged.iter().find(lacks)
                    && tested.report.verdict == Verdict::Good
                {
                    tested.report.verdict = Verdict::Refused(finding.cause.clone());
                }
                tested.report.findings.extend(judged);
                tested.report.info = Some(Arc::new(info));
            }
            Err(problem) => {
                tested.report.verdict = Verdict::Unclear(format!(
                    "cannot parse the exchange's answer about the key: {problem}"
                ));
            }
        }
        for scope in test.scopes.iter().copied() {
            if test.reads
                && let Some(body) = self.check(test, &mut tested, scope, read_of(scope)).await
                && scope == Scope::SpotMargin
            {
                tested
                    .report
                    .findings
                    .extend(key_info::funds_in_main(&body));
            }
            if test.orders
                && let Some(order) = order_of(scope)
            {
                self.check(test, &mut tested, scope, order).await;
            }
        }
        tested
    }

    /// What the rules and this broker require of a key.
    fn expected(&self, test: &KeyTest) -> Expected {
        Expected {
            scopes: test.scopes.iter().copied().collect(),
            is_read_only: test.account.purpose == Purpose::ReadOnly,
            allow_money_out: test.account.allow_money_out,
            site: test.account.site,
            egress_ip: self.proof.expected(),
            version: test.key.version(),
            now_ms: self.clock.wall_ms(),
        }
    }

    /// Sends one request; returns the body of an accepted answer.
    async fn check(
        self: &Arc<Self>,
        test: &KeyTest,
        tested: &mut KeyTestResult,
        scope: Scope,
        ask: Ask,
    ) -> Option<Bytes> {
        let request = format!("{} {} ({scope})", ask.method, ask.path);
        let is_order = ask.method == Method::Post;
        let result = self
            .send_internal(
                test.principal.clone(),
                &test.account.id,
                scope,
                ask,
                Some(Arc::clone(&test.key)),
            )
            .await;
        let (is_ok, shown, verdict) = match &result {
            Ok(receipt) if receipt.answer.outcome == Outcome::Accepted => {
                (true, "accepted".to_owned(), None)
            }
            Ok(receipt) => {
                let answer = &receipt.answer;
                let code = answer.code.as_str();
                let shown = printable(&format!("{code} {}", answer.msg));
                let shown = if shown.is_empty() {
                    format!("HTTP {}", answer.http_status.as_u16())
                } else {
                    shown
                };
                let is_final = answer.outcome == Outcome::Rejected
                    && (KEY_REFUSED.contains(&code) || ACCOUNT_REFUSED.contains(&code));
                // An order that is rejected for its contents or for lack of funds shows that the key may place orders.
                let is_about_order = is_order && answer.outcome == Outcome::Rejected;
                let verdict = if is_final || is_about_order {
                    let egress_ip = self.proof.expected();
                    let mut finding = key_info::refusal(code, &answer.msg, scope, egress_ip);
                    if !is_final {
                        finding.severity = Severity::Warning;
                    }
                    let verdict = is_final.then(|| Verdict::Refused(finding.cause.clone()));
                    if !tested.report.findings.iter().any(|f| f.id == finding.id) {
                        tested.report.findings.push(finding);
                    }
                    verdict
                } else {
                    Some(Verdict::Unclear(shown.clone()))
                };
                (false, shown, verdict)
            }
            Err(error) => {
                let shown = error.of_repeatable_request();
                (false, shown.clone(), Some(Verdict::Unclear(shown)))
            }
        };
        tested.checks.push(Check {
            request,
            is_ok,
            result: shown,
        });
        match (&tested.report.verdict, verdict) {
            (_, None) | (Verdict::Refused(_), _) => {}
            (_, Some(verdict)) => tested.report.verdict = verdict,
        }
        result
            .ok()
            .filter(|_| is_ok)
            .map(|receipt| receipt.answer.body)
    }

    /// Sends a request of an admin or of the broker itself over the normal request path.
    pub(crate) async fn send_internal(
        self: &Arc<Self>,
        principal: Principal,
        account: &AccountId,
        scope: Scope,
        ask: Ask,
        key: Option<Arc<Key>>,
    ) -> Result<Receipt, BrokerError> {
        let Ask {
            method,
            path,
            query,
            body,
        } = ask;
        // The paths are constants in normal form.
        let target = Target::new(path, query).map_err(|_| BrokerError::Internal)?;
        let request = UnsignedRequest {
            account: account.clone(),
            scope,
            method,
            target,
            body,
            id: RequestId::random(),
            body_client_oids: Vec::new(),
        };
        self.send_request(principal, request, key).await
    }

    /// Sends a request of an admin or of the broker itself over the normal request path.
    pub(crate) async fn send_request(
        self: &Arc<Self>,
        principal: Principal,
        request: UnsignedRequest,
        key: Option<Arc<Key>>,
    ) -> Result<Receipt, BrokerError> {
        let arrived = Instant::now();
        self.sign_and_send(Call {
            principal,
            request,
            key,
            arrived,
            deadline: arrived + ANSWER_WITHIN,
            not_after_ms: None,
            resolve_within: Duration::ZERO,
            slot: None,
        })
        .await
    }

    fn record(&self, change: &KeyChange) {
        let digest = |version: &Option<(u64, KeyDigest)>| version.map(|(_, digest)| digest.hex());
        let line = self.audit.record_action(
            "vault",
            &Act {
                action: "key",
                account: Some(&change.account),
                key: Some(&change.name),
                version_before: change.before.map(|(version, _)| version),
                version_after: change.after.map(|(version, _)| version),
                key_before: digest(&change.before),
                key_after: digest(&change.after),
                outcome: change.outcome,
                detail: change.detail.clone(),
                ..Act::default()
            },
        );
        drop(line);
    }
}

impl KeyTest {
    /// Whether the rules name a partner for one of the key's scopes.
    pub(crate) fn has_partner(&self) -> bool {
        let mut partners = self.account.partners.keys();
        partners.any(|scope| self.scopes.contains(scope))
    }
}

impl KeyTestResult {
    /// Adds a finding that makes the key unusable.
    fn add_finding(&mut self, finding: Diagnosis) {
        self.report.verdict = Verdict::Refused(finding.cause.clone());
        self.report.findings.push(finding);
    }

    /// Whether the request for the key's details was rejected with one of these codes.
    fn is_refused_for(&self, codes: &[&str]) -> bool {
        self.report.info.is_none()
            && self.checks.iter().any(|check| {
                let code = check.result.split(' ').next().unwrap_or_default();
                !check.is_ok && codes.contains(&code)
            })
    }
}

/// Cleans text of the exchange for logs and terminals.
fn printable(text: &str) -> String {
    clean(text.trim(), 200).into_owned()
}

fn is_revoked(revoked: &Revoked) -> Diagnosis {
    let Revoked { by, account, .. } = revoked;
    Diagnosis::failed(
        "key-revoked",
        format!("{by} revoked this key of account {account} permanently."),
        "Create a new key under API Management, delete this one there, and register the new one.",
    )
}

fn lacks_partner_key(account: &Account) -> Diagnosis {
    let id = &account.id;
    Diagnosis::failed(
        "partner-key-missing",
        format!("The rules name a partner for account {id}, but the key has no partner key."),
        "Register the key with its partner key, or remove the partner from the rules.",
    )
}

/// A request of an admin or of the broker itself.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// HTTP method.
    pub(crate) method: Method,
    /// Path.
    pub(crate) path: &'static str,
    /// Query.
    pub(crate) query: Vec<(String, String)>,
    /// Body.
    pub(crate) body: Bytes,
}

impl Ask {
    /// A read.
    pub(crate) fn get(path: &'static str) -> Self {
        Self {
            method: Method::Get,
            path,
            query: Vec::new(),
            body: Bytes::new(),
        }
    }

    /// Adds a query parameter.
    #[must_use]
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.query.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// The request for the key's details that a key of these scopes may send, and its scope.
pub(crate) fn info_of(scopes: &BTreeSet<Scope>) -> (Scope, Ask) {
    if scopes.iter().all(|scope| *scope == Scope::Unified) {
        (Scope::Unified, Ask::get("/api/ua/v2/user/api-key"))
    } else {
        (Scope::SpotMargin, Ask::get("/api/v1/user/api-key"))
    }
}

/// A read that needs the permission for trading in the scope. Source: KuCoin API documentation, "Get Account List - Spot", "Get
/// Account - Futures" (permission Futures), "Get Account Overview" of the unified account.
pub(crate) fn read_of(scope: Scope) -> Ask {
    match scope {
        Scope::Futures => Ask::get("/api/v1/account-overview").with("currency", "USDT"),
        Scope::SpotMargin => Ask::get("/api/v1/accounts"),
        Scope::Unified => Ask::get("/api/ua/v2/unified/account/overview"),
    }
}

/// A test order, which is validated but not placed. Source: KuCoin API documentation, "Add Order Test" of spot and futures.
pub(crate) fn order_of(scope: Scope) -> Option<Ask> {
    let client_oid = RequestId::random().to_string();
    let (path, body) = match scope {
        Scope::Futures => (
            "/api/v1/orders/test",
            json!({
                "clientOid": client_oid, "side": "buy", "symbol": "XBTUSDTM", "type": "limit", "price": "1000",
                "size": 1, "leverage": 1,
            }),
        ),
        Scope::SpotMargin => (
            "/api/v1/hf/orders/test",
            json!({
                "clientOid": client_oid, "side": "buy", "symbol": "BTC-USDT", "type": "limit", "price": "1000",
                "size": "0.001",
            }),
        ),
        Scope::Unified => return None,
    };
    Some(Ask {
        method: Method::Post,
        path,
        query: Vec::new(),
        body: Bytes::from(body.to_string()),
    })
}
