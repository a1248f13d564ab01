//! Tests keys on the exchange, over the one request path: what is this key, and does the exchange take what it signs?

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

/// How long one question may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(4);

/// How many keys are tested at once in the background.
const AT_ONCE: usize = 8;

/// How often it is looked whether new rules name a key.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A key to be tested.
#[derive(Debug)]
pub(crate) struct KeyTest {
    /// Who wants to know.
    pub(crate) who: Principal,
    /// Its account, as the rules have it.
    pub(crate) account: Arc<Account>,
    /// The scopes that it serves.
    pub(crate) scopes: BTreeSet<Scope>,
    /// The key.
    pub(crate) key: Arc<Key>,
    /// Whether every scope is tried with a read.
    pub(crate) reads: bool,
    /// Whether an order is validated where there is an endpoint for that; none is placed.
    pub(crate) orders: bool,
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct KeyTestResult {
    /// What the exchange says about the key.
    pub(crate) report: Report,
    /// What was asked, and what came.
    pub(crate) checks: Vec<Check>,
}

/// One question, and what came.
#[derive(Clone, Debug)]
pub(crate) struct Check {
    /// What was asked.
    pub(crate) question: String,
    /// Whether the answer was the one expected.
    pub(crate) is_ok: bool,
    /// What came, in a few words; no balances.
    pub(crate) answer: String,
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
            // The rules that name it may be about to take their place.
            let (account, scopes) = loop {
                match self.served(&account, &name) {
                    Some(served) => break served,
                    None => sleep(LOOK_EVERY).await,
                }
            };
            // Somebody may be waiting for a candidate; the others come a few at a time.
            let _place = if is_candidate {
                None
            } else {
                at_once.acquire().await.ok()
            };
            let test = KeyTest {
                who: Principal::Broker,
                account,
                scopes,
                key,
                reads: is_candidate,
                orders: false,
            };
            self.test_key(&test).await.report
        };
        let report = tokio::select! {
            report = test => report,
            // Nobody waits any more: it may not even be ours any more.
            () = tell.closed() => return,
        };
        let _ = tell.send(report);
    }

    /// The account of a key, and the scopes that it serves; none where the rules do not name it.
    pub(crate) fn served(
        &self,
        account: &AccountId,
        name: &KeyName,
    ) -> Option<(Arc<Account>, BTreeSet<Scope>)> {
        let policy = self.policy();
        let account = policy.accounts().find(|entry| entry.id == *account)?;
        let serves = account.keys.iter().filter(|(_, named)| *named == name);
        let scopes: BTreeSet<_> = serves.map(|(scope, _)| *scope).collect();
        (!scopes.is_empty()).then(|| (Arc::clone(account), scopes))
    }

    /// Tests a key whose version is not known: as the newest kind first, which is what KuCoin makes now. `make` makes the
    /// key of a version.
    ///
    /// # Errors
    /// What `make` fails with.
    pub(crate) async fn test_versions<E>(
        self: &Arc<Self>,
        test: KeyTest,
        make: impl Fn(KeyVersion) -> Result<Arc<Key>, E>,
    ) -> Result<(KeyTestResult, KeyVersion), E> {
        let newest = test.key.version();
        let told = |tested: &KeyTestResult| match tested.report.info.as_ref()?.version? {
            2 => Some(KeyVersion::V2),
            3 => Some(KeyVersion::V3),
            _ => None,
        };
        let first = self.test_key(&test).await;
        let other = match told(&first) {
            // It is taken, and the exchange says itself which version it is.
            Some(version) if version == newest => return Ok((first, newest)),
            Some(version) => version,
            None if first.report.info.is_some() => return Ok((first, newest)),
            // KuCoin does not document how it refuses a key that is used as one of another version.
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

    /// Asks the exchange about a key, and with it.
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
                    "the answer about the key cannot be read: {problem}"
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

    /// What the rules and this broker expect of a key.
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

    /// Asks one thing; returns the body of an answer that says that all went well.
    async fn check(
        self: &Arc<Self>,
        test: &KeyTest,
        tested: &mut KeyTestResult,
        scope: Scope,
        ask: Ask,
    ) -> Option<Bytes> {
        let question = format!("{} {} ({scope})", ask.method, ask.path);
        let is_order = ask.method == Method::Post;
        let asked = self
            .ask_as(
                test.who.clone(),
                &test.account.id,
                scope,
                ask,
                Some(Arc::clone(&test.key)),
            )
            .await;
        let (is_ok, answer, verdict) = match &asked {
            Ok(receipt) if receipt.answer.outcome == Outcome::Accepted => {
                (true, "taken".to_owned(), None)
            }
            Ok(receipt) => {
                let answer = &receipt.answer;
                let code = answer.code.as_str();
                let told = printable(&format!("{code} {}", answer.msg));
                let told = if told.is_empty() {
                    format!("HTTP {}", answer.http_status.as_u16())
                } else {
                    told
                };
                let is_final = answer.outcome == Outcome::Rejected
                    && (KEY_REFUSED.contains(&code) || ACCOUNT_REFUSED.contains(&code));
                // An order that is refused for what it says, or for want of money, was refused to a key that may place it.
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
                    Some(Verdict::Unclear(told.clone()))
                };
                (false, told, verdict)
            }
            Err(error) => {
                let told = error.of_repeatable_request();
                (false, told.clone(), Some(Verdict::Unclear(told)))
            }
        };
        tested.checks.push(Check {
            question,
            is_ok,
            answer,
        });
        match (&tested.report.verdict, verdict) {
            (_, None) | (Verdict::Refused(_), _) => {}
            (_, Some(verdict)) => tested.report.verdict = verdict,
        }
        asked
            .ok()
            .filter(|_| is_ok)
            .map(|receipt| receipt.answer.body)
    }

    /// Sends a request of an admin, or of the broker's own, over the one request path.
    pub(crate) async fn ask_as(
        self: &Arc<Self>,
        who: Principal,
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
        // Its paths are constants, and in normal form.
        let target = Target::new(path, query).map_err(|_| BrokerError::Internal)?;
        let arrived = Instant::now();
        let request = UnsignedRequest {
            account: account.clone(),
            scope,
            method,
            target,
            body,
            id: RequestId::random(),
            body_client_oids: Vec::new(),
        };
        self.sign_and_send(Call {
            who,
            request,
            key,
            arrived,
            deadline: arrived + ANSWER_WITHIN,
            slot: None,
        })
        .await
    }

    fn record(&self, change: &KeyChange) {
        let digest = |place: &Option<(u64, KeyDigest)>| place.map(|(_, digest)| digest.hex());
        self.audit.acted(
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
    }
}

impl KeyTest {
    /// Whether the account has a partner where this key signs.
    pub(crate) fn has_partner(&self) -> bool {
        let mut partners = self.account.partners.keys();
        partners.any(|scope| self.scopes.contains(scope))
    }
}

impl KeyTestResult {
    /// Takes in something for which the key cannot be used.
    fn add_finding(&mut self, finding: Diagnosis) {
        self.report.verdict = Verdict::Refused(finding.cause.clone());
        self.report.findings.push(finding);
    }

    /// Whether the first question was refused with one of these codes.
    fn is_refused_for(&self, codes: &[&str]) -> bool {
        self.report.info.is_none()
            && self.checks.iter().any(|check| {
                let code = check.answer.split(' ').next().unwrap_or_default();
                !check.is_ok && codes.contains(&code)
            })
    }
}

/// Text of the exchange goes to logs and terminals.
fn printable(text: &str) -> String {
    clean(text.trim(), 200).into_owned()
}

fn is_revoked(revoked: &Revoked) -> Diagnosis {
    let Revoked { by, account, .. } = revoked;
    Diagnosis::failed(
        "key-revoked",
        format!("{by} revoked this key for account {account} for good."),
        "Create a new key under API Management, delete this one there, and register the new one.",
    )
}

fn lacks_partner_key(account: &Account) -> Diagnosis {
    let id = &account.id;
    Diagnosis::failed(
        "partner-key-missing",
        format!(
            "Account {id} has a partner in the rules, and the key comes without a partner key."
        ),
        "Give the partner key with it, or take the partner out of the rules.",
    )
}

/// A request of an admin or of the broker's own.
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

    /// The same with one more parameter.
    #[must_use]
    pub(crate) fn with(mut self, name: &str, value: &str) -> Self {
        self.query.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// What is this key? The question that fits a key of these scopes, and the scope to ask it in.
pub(crate) fn info_of(scopes: &BTreeSet<Scope>) -> (Scope, Ask) {
    if scopes.iter().all(|scope| *scope == Scope::Unified) {
        (Scope::Unified, Ask::get("/api/ua/v2/user/api-key"))
    } else {
        (Scope::SpotMargin, Ask::get("/api/v1/user/api-key"))
    }
}

/// A read that needs what trading in the scope needs. Source: KuCoin API documentation, "Get Account List - Spot", "Get
/// Account - Futures" (permission Futures), "Get Account Overview" of the unified account.
pub(crate) fn read_of(scope: Scope) -> Ask {
    match scope {
        Scope::Futures => Ask::get("/api/v1/account-overview").with("currency", "USDT"),
        Scope::SpotMargin => Ask::get("/api/v1/accounts"),
        Scope::Unified => Ask::get("/api/ua/v2/unified/account/overview"),
    }
}

/// An order that is only validated. Source: KuCoin API documentation, "Add Order Test" of spot and futures.
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
