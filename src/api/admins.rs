//! The `Admin` service: calls about keys, accounts and bots. No response contains a secret.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::task::spawn_blocking;
use tonic::{Request, Response, Status};
use zeroize::Zeroizing;

use super::admin_error::{AdminError, host_name};
use super::budgets;
use super::messages::in_proto;
use crate::audit::Act;
use crate::base::diagnosis::Diagnosis;
use crate::base::ids::{AccountId, AdminId, BotId, KeyName, Principal};
use crate::base::secret::{ApiSecret, PartnerKey, Passphrase};
use crate::broker::Broker;
use crate::clock::{self, HostId};
use crate::keyring;
use crate::keyring::key_test::Verdict;
use crate::kucoin::key_info::{self, KeyInfo};
use crate::kucoin::{Key, KeyVersion};
use crate::ops::key_health::{self, KeyHealth, scopes};
use crate::ops::key_test::{KeyTest, KeyTestResult};
use crate::policy::Account;
use crate::proto::admin_server::Admin;
use crate::proto::{self, KeyState, RefreshKeyResponse, RevokedKey, TestKeyResponse};
use crate::restrictions::{KeyDigest, Mark, Restrictions, RestrictionsError};
use crate::telemetry::chain;

/// The service.
#[derive(Debug)]
pub(crate) struct AdminApi {
    pub(super) broker: Arc<Broker>,
}

impl AdminApi {
    /// Creates the API of `broker`.
    pub(crate) fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }

    /// The account of this name in the rules.
    pub(super) fn account(&self, name: &str) -> Result<Arc<Account>, AdminError> {
        let id: AccountId = name
            .parse()
            .map_err(|error| AdminError::field("account", error))?;
        let policy = self.broker.policy();
        let found = policy.accounts().find(|account| account.id == id).cloned();
        found.ok_or(AdminError::AccountUnknown(id))
    }

    /// The account that a request names, or `None` for all; exactly one of the two must be set.
    fn account_or_all(&self, account: &str, all: bool) -> Result<Option<Arc<Account>>, AdminError> {
        match (account.is_empty(), all) {
            (true, false) => Err(AdminError::field("account", "set an account, or set `all`")),
            (false, true) => Err(AdminError::field(
                "all",
                "cannot be combined with an account; set only one of them",
            )),
            (true, true) => Ok(None),
            (false, false) => self.account(account).map(Some),
        }
    }

    /// A bot by its full name, or by the last part of it if only one known bot has it. A short name of no known bot is
    /// refused, since it would block no bot.
    fn bot(&self, name: &str) -> Result<BotId, AdminError> {
        let id: BotId = name
            .parse()
            .map_err(|error| AdminError::field("bot", error))?;
        let policy = self.broker.policy();
        let blocked = self.broker.restrictions.blocked_bots();
        let blocked = blocked.iter().map(|(bot, _)| bot);
        let known: BTreeSet<_> = policy.bots().chain(blocked).collect();
        // A full name is also accepted if no rule names the bot, so that it can be blocked in advance.
        if name.starts_with("spiffe://") || known.contains(&id) {
            return Ok(id);
        }
        let has_name = |bot: &&BotId| bot.as_str().rsplit('/').next() == Some(name);
        let found: Vec<_> = known.into_iter().filter(has_name).collect();
        match found.as_slice() {
            [bot] => Ok((*bot).clone()),
            [] => {
                let problem = "no rule names this bot; use its full name from its certificate: spiffe://<trust domain>/bot/<name>";
                Err(AdminError::field("bot", problem))
            }
            many => {
                let many: Vec<_> = many.iter().map(|bot| bot.as_str()).collect();
                let problem = format!("is ambiguous: {}; use the full name", many.join(", "));
                Err(AdminError::field("bot", problem))
            }
        }
    }

    /// A host that the accounts of the rules use: `site/host`, or `host` if only one site has it.
    fn host_id(&self, name: &str) -> Result<HostId, AdminError> {
        let hosts = self.broker.policy().hosts();
        let has_name = |host: &HostId| host_name(*host) == name || host.1.as_str() == name;
        let mut found = hosts.iter().copied().filter(has_name);
        if let (Some(host), None) = (found.next(), found.next()) {
            return Ok(host);
        }
        let known: Vec<_> = hosts.iter().copied().map(host_name).collect();
        let problem = format!("expected one of {}, got {name:?}", known.join(", "));
        Err(AdminError::field("host", problem))
    }

    /// The loaded key of this name.
    fn loaded(&self, account: &AccountId, name: &KeyName) -> Result<Arc<Key>, AdminError> {
        let mut keys = self.broker.keyring.entries().into_iter();
        let found = keys.find(|key| key.account == *account && key.name == *name);
        match found.map(|key| key.state) {
            Some(keyring::KeyState::Loaded { key, .. }) => Ok(key),
            Some(keyring::KeyState::Absent(reason) | keyring::KeyState::Pending(reason)) => {
                Err(AdminError::KeyUnavailable(reason))
            }
            None => Err(AdminError::KeyUnknown(account.clone(), name.clone())),
        }
    }

    /// A key of an account; without a name, its only one.
    fn key(&self, account: &str, name: &str) -> Result<(Arc<Account>, KeyName), AdminError> {
        let account = self.account(account)?;
        if name.is_empty() {
            let names: BTreeSet<_> = account.keys.values().collect();
            let only = names.first().filter(|_| names.len() == 1);
            if let Some(only) = only.map(|only| (*only).clone()) {
                return Ok((account, only));
            }
            let names: Vec<_> = names.iter().map(|name| name.as_str()).collect();
            let id = &account.id;
            let problem = if names.is_empty() {
                format!("account {id} has no key in the rules")
            } else {
                let names = names.join(", ");
                format!(
                    "account {id} has several keys in the rules: {names}; select one with --key"
                )
            };
            return Err(AdminError::field("key", problem));
        }
        let name: KeyName = name
            .parse()
            .map_err(|error| AdminError::field("key", error))?;
        if account.keys.values().any(|known| *known == name) {
            Ok((account, name))
        } else {
            Err(AdminError::KeyUnknown(account.id.clone(), name))
        }
    }

    /// Audits and logs an admin action.
    pub(super) async fn record(&self, admin: &AdminId, act: &Act<'_>) {
        let Act {
            action,
            account,
            key,
            target_bot,
            outcome,
            ..
        } = act;
        tracing::warn!(
            admin.id = %admin,
            action,
            account.id = account.map(AccountId::as_str),
            key.name = key.map(KeyName::as_str),
            bot.id = target_bot.map(BotId::as_str),
            outcome,
            detail = act.detail,
            "admin action"
        );
        let line = self.broker.audit.record_action(admin.as_str(), act);
        line.written().await;
    }

    fn mark(&self, admin: &AdminId) -> Mark {
        Mark {
            by: admin.clone(),
            at_ms: self.broker.clock.wall_ms(),
        }
    }

    /// Changes the restrictions, on disk before it returns, and audits the change.
    async fn restrict<T: Send + 'static>(
        &self,
        admin: &AdminId,
        act: Act<'_>,
        change: impl FnOnce(&Restrictions) -> Result<T, RestrictionsError> + Send + 'static,
    ) -> Result<T, AdminError> {
        let restrictions = Arc::clone(&self.broker.restrictions);
        // In a thread of its own: a disk that hangs must not block the calls of bots.
        let changed = spawn_blocking(move || change(&restrictions)).await;
        let changed = changed.map_err(|_| AdminError::Internal)?;
        let (outcome, problem) = match &changed {
            Ok(_) => ("done", None),
            Err(error) => ("failed", Some(chain(error))),
        };
        let detail = problem.or(act.detail.clone());
        self.record(
            admin,
            &Act {
                outcome,
                detail,
                ..act
            },
        )
        .await;
        Ok(changed?)
    }

    /// The finding that another account already has this key, or one of the same KuCoin account; covers loaded keys only.
    fn duplicate_key(
        &self,
        account: &AccountId,
        digest: KeyDigest,
        info: Option<&KeyInfo>,
    ) -> Option<Diagnosis> {
        let uid = info.and_then(|info| info.uid.as_deref());
        let others = key_health::all(&self.broker).into_iter();
        let mut others = others.filter(|other| other.account != *account);
        let has = |other: &KeyHealth| {
            let other_uid = other.info.as_ref().and_then(|info| info.uid.as_deref());
            other.id == Some(digest) || (uid.is_some() && other_uid == uid)
        };
        others.find(has).map(|other| {
            key_info::duplicate_key(&other.account.to_string(), &other.name.to_string())
        })
    }

    /// Revokes one key of an account.
    async fn revoke(
        &self,
        admin: &AdminId,
        account: &AccountId,
        name: KeyName,
    ) -> Result<RevokedKey, AdminError> {
        let health = key_health::one(&self.broker, account, &name);
        let health = health.ok_or_else(|| AdminError::KeyUnknown(account.clone(), name.clone()))?;
        // If no key is loaded, the last one is revoked, since it may be loaded again. If it is already revoked, nothing
        // changes: a repeated command must not revoke the next key.
        let (id, version) = (health.last, health.version);
        let is_revoked = |id| self.broker.restrictions.revoked(id).is_some();
        let was_revoked = health.id.is_none() && id.is_some_and(is_revoked);
        let act = Act {
            action: "revoke",
            account: Some(account),
            key: Some(&name),
            version_before: version,
            key_before: id.map(KeyDigest::hex),
            ..Act::default()
        };
        let (mark, key) = (self.mark(admin), (account.clone(), name.clone()));
        let revoked = self
            .restrict(admin, act, move |restrictions| {
                restrictions.revoke(&key.0, &key.1, id, &mark)
            })
            .await;
        // The key is wiped even if the revocation is not on disk; the admin gets that error.
        let unseen = self.broker.keyring.wipe_revoked();
        revoked?;
        if !unseen.is_empty() {
            // The key was read from Vault after its id was looked up above.
            let restrictions = Arc::clone(&self.broker.restrictions);
            let seen = spawn_blocking(move || {
                let mut seen = unseen.iter();
                seen.try_for_each(|(account, name, key)| restrictions.seen(account, name, *key))
            });
            seen.await.map_err(|_| AdminError::Internal)??;
        }
        Ok(RevokedKey {
            key: name.to_string(),
            version: version.unwrap_or_default(),
            id_sha256: id.map(KeyDigest::hex).unwrap_or_default(),
            was_revoked,
        })
    }
}

/// The admin who calls, and the message.
fn opened<T>(request: Request<T>) -> Result<(AdminId, T), AdminError> {
    // The listener accepts only connections with an admin certificate.
    let admin = request.extensions().get::<AdminId>().cloned();
    Ok((admin.ok_or(AdminError::Internal)?, request.into_inner()))
}

/// The key in a request, as the given API key version.
fn candidate(given: &proto::Candidate, version: KeyVersion) -> Result<Arc<Key>, AdminError> {
    let text = |text: &str| Zeroizing::new(text.to_owned());
    let secret = ApiSecret::new(text(&given.api_secret));
    let passphrase = Passphrase::new(text(&given.passphrase));
    let partner =
        (!given.partner_key.is_empty()).then(|| PartnerKey::new(text(&given.partner_key)));
    let id = text(&given.api_key);
    Key::new(id, &secret, &passphrase, version, partner.as_ref())
        .map_err(|error| AdminError::field("candidate", error))
}

#[tonic::async_trait]
impl Admin for AdminApi {
    async fn test_key(
        &self,
        request: Request<proto::TestKeyRequest>,
    ) -> Result<Response<TestKeyResponse>, Status> {
        let (admin, message) = opened(request)?;
        let (account, name) = self.key(&message.account, &message.key)?;
        let scopes = scopes(&account, &name);
        let given = message.candidate;
        let is_candidate = given.is_some();
        let make = |version| match &given {
            Some(given) => candidate(given, version),
            None => self.loaded(&account.id, &name),
        };
        let version = match given.as_ref().map_or(0, |given| given.key_version) {
            0 | 3 => KeyVersion::V3,
            2 => KeyVersion::V2,
            other => {
                let problem = format!("expected 2 or 3, or 0 for automatic detection, got {other}");
                return Err(AdminError::field("candidate.key_version", problem).into());
            }
        };
        let key = make(version)?;
        let digest = KeyDigest(key.id_sha256());
        let test = KeyTest {
            principal: Principal::Admin(admin.clone()),
            account: Arc::clone(&account),
            scopes: scopes.iter().copied().collect(),
            key: Arc::clone(&key),
            reads: true,
            orders: message.try_order,
        };
        let needs_partner_key = test.has_partner();
        let (KeyTestResult { mut report, checks }, version) =
            if given.as_ref().is_some_and(|given| given.key_version == 0) {
                self.broker.test_versions(test, make).await?
            } else {
                (self.broker.test_key(&test).await, key.version())
            };
        if is_candidate {
            let duplicate = self.duplicate_key(&account.id, digest, report.info.as_deref());
            report.findings.extend(duplicate);
        }
        let act = Act {
            action: "test",
            account: Some(&account.id),
            key: Some(&name),
            key_after: Some(digest.hex()),
            outcome: "done",
            detail: Some(match &report.verdict {
                Verdict::Good => "the exchange accepts the key".to_owned(),
                Verdict::Refused(reason) | Verdict::Unclear(reason) => reason.clone(),
            }),
            ..Act::default()
        };
        self.record(&admin, &act).await;
        let response = TestKeyResponse {
            info: report.info.as_deref().map(proto::KeyInfo::from),
            requests: checks.into_iter().map(proto::RequestResult::from).collect(),
            findings: report
                .findings
                .iter()
                .cloned()
                .map(proto::Finding::from)
                .collect(),
            scopes: in_proto(&scopes),
            key: name.to_string(),
            id_sha256: digest.hex(),
            egress_ip: self.broker.proof.expected().to_string(),
            key_version: if version == KeyVersion::V2 { 2 } else { 3 },
            is_inconclusive: matches!(report.verdict, Verdict::Unclear(_)),
            needs_partner_key,
        };
        if !is_candidate {
            let report = Arc::new(report);
            self.broker
                .keyring
                .set_tested(&account.id, &name, &key, report);
        }
        Ok(Response::new(response))
    }

    async fn list_keys(
        &self,
        _request: Request<proto::ListKeysRequest>,
    ) -> Result<Response<proto::ListKeysResponse>, Status> {
        let keys = key_health::all(&self.broker)
            .into_iter()
            .map(KeyState::from);
        let keys = keys.collect();
        Ok(Response::new(proto::ListKeysResponse { keys }))
    }

    async fn list_budgets(
        &self,
        request: Request<proto::ListBudgetsRequest>,
    ) -> Result<Response<proto::ListBudgetsResponse>, Status> {
        let (_, message) = opened(request)?;
        let account = match message.account.as_str() {
            "" => None,
            account => Some(self.account(account)?.id.clone()),
        };
        let listed = budgets::list(&self.broker, account.as_ref());
        Ok(Response::new(listed))
    }

    async fn refresh_key(
        &self,
        request: Request<proto::RefreshKeyRequest>,
    ) -> Result<Response<RefreshKeyResponse>, Status> {
        let (admin, message) = opened(request)?;
        let (account, name) = self.key(&message.account, &message.key)?;
        let unknown = || AdminError::KeyUnknown(account.id.clone(), name.clone());
        let before = key_health::one(&self.broker, &account.id, &name).ok_or_else(unknown)?;
        let is_seen = self.broker.keyring.refresh_now(&account.id, &name).await;
        let after = key_health::one(&self.broker, &account.id, &name).ok_or_else(unknown)?;
        let act = Act {
            action: "refresh",
            account: Some(&account.id),
            key: Some(&name),
            version_before: before.version,
            version_after: after.version,
            key_before: before.id.map(KeyDigest::hex),
            key_after: after.id.map(KeyDigest::hex),
            outcome: if is_seen { "done" } else { "failed" },
            detail: Some(after.reasons().join("; ")).filter(|reasons| !reasons.is_empty()),
            ..Act::default()
        };
        self.record(&admin, &act).await;
        let state = Some(after.into());
        Ok(Response::new(RefreshKeyResponse { state }))
    }

    async fn revoke_key(
        &self,
        request: Request<proto::RevokeKeyRequest>,
    ) -> Result<Response<proto::RevokeKeyResponse>, Status> {
        let (admin, message) = opened(request)?;
        let (account, names) = if message.key.is_empty() {
            let account = self.account(&message.account)?;
            let names: BTreeSet<_> = account.keys.values().cloned().collect();
            (account, names)
        } else {
            let (account, name) = self.key(&message.account, &message.key)?;
            (account, [name].into())
        };
        let mut keys = Vec::new();
        for name in names {
            keys.push(self.revoke(&admin, &account.id, name).await);
        }
        // All keys are revoked before an error about one that is not on disk is returned.
        let keys = keys.into_iter().collect::<Result<_, _>>()?;
        Ok(Response::new(proto::RevokeKeyResponse { keys }))
    }

    async fn block_bot(
        &self,
        request: Request<proto::BlockBotRequest>,
    ) -> Result<Response<proto::BlockBotResponse>, Status> {
        let (admin, message) = opened(request)?;
        let bot = self.bot(&message.bot)?;
        let (mark, id) = (self.mark(&admin), bot.clone());
        let act = Act::on_bot("block", &bot);
        let block = move |restrictions: &Restrictions| restrictions.block(&id, &mark);
        let was_blocked = self.restrict(&admin, act, block).await?;
        Ok(Response::new(proto::BlockBotResponse {
            was_blocked,
            bot: bot.to_string(),
            is_in_rules: self.broker.policy().names(&bot),
        }))
    }

    async fn unblock_bot(
        &self,
        request: Request<proto::UnblockBotRequest>,
    ) -> Result<Response<proto::UnblockBotResponse>, Status> {
        let (admin, message) = opened(request)?;
        let bot = self.bot(&message.bot)?;
        let id = bot.clone();
        let act = Act::on_bot("unblock", &bot);
        let unblock = move |restrictions: &Restrictions| restrictions.unblock(&id);
        let was_blocked = self.restrict(&admin, act, unblock).await?;
        Ok(Response::new(proto::UnblockBotResponse {
            was_blocked,
            bot: bot.to_string(),
        }))
    }

    async fn halt(
        &self,
        request: Request<proto::HaltRequest>,
    ) -> Result<Response<proto::HaltResponse>, Status> {
        let (admin, message) = opened(request)?;
        let account = self.account_or_all(&message.account, message.all)?;
        let (mark, id) = (
            self.mark(&admin),
            account.as_ref().map(|account| account.id.clone()),
        );
        let act = Act {
            action: "halt",
            account: account.as_ref().map(|account| &account.id),
            detail: account.is_none().then(|| "all accounts".to_owned()),
            ..Act::default()
        };
        let halt = move |restrictions: &Restrictions| restrictions.halt(id.as_ref(), &mark);
        let halted = self.restrict(&admin, act, halt).await;
        if !message.cancel_all {
            halted?;
            return Ok(Response::new(proto::HaltResponse::default()));
        }
        // The halt is in effect even if it is not on disk: cancel the orders, and report both.
        let problem = match halted {
            Ok(()) => String::new(),
            Err(error @ AdminError::Restrictions(_)) => error.to_string(),
            Err(error) => return Err(error.into()),
        };
        let cancelled = self.broker.cancel_all(&admin, account.as_deref()).await;
        for one in &cancelled {
            let (outcome, open) = match one.still_open {
                Some(0) => ("done", "no open orders".to_owned()),
                Some(open) => ("failed", format!("still open: {open}")),
                None => ("failed", "open orders unknown".to_owned()),
            };
            let act = Act {
                outcome,
                detail: Some(format!("{}: {open}", one.scope)),
                ..Act::on_account("cancel-all", &one.account)
            };
            self.record(&admin, &act).await;
        }
        let cancelled = cancelled.into_iter().map(proto::Cancelled::from).collect();
        Ok(Response::new(proto::HaltResponse { cancelled, problem }))
    }

    async fn resume(
        &self,
        request: Request<proto::ResumeRequest>,
    ) -> Result<Response<proto::ResumeResponse>, Status> {
        let (admin, message) = opened(request)?;
        let restrictions = &self.broker.restrictions;
        let account = match self.account_or_all(&message.account, message.all) {
            Ok(account) => account.map(|account| account.id.clone()),
            // The rules may no longer name an account that is halted.
            Err(AdminError::AccountUnknown(id)) if restrictions.halted_accounts().contains(&id) => {
                Some(id)
            }
            Err(error) => return Err(error.into()),
        };
        let id = account.clone();
        let act = Act {
            action: "resume",
            account: account.as_ref(),
            detail: account.is_none().then(|| "all accounts".to_owned()),
            ..Act::default()
        };
        let resume = move |restrictions: &Restrictions| restrictions.resume(id.as_ref());
        let was_halted = self.restrict(&admin, act, resume).await?;
        let mut still_halted = restrictions.halted_accounts();
        if let Some(account) = account {
            still_halted = vec![account];
            still_halted.retain(|account| restrictions.is_halted(account));
        }
        Ok(Response::new(proto::ResumeResponse {
            still_halted: still_halted.iter().map(ToString::to_string).collect(),
            was_halted,
            is_all_halted: restrictions.is_all_halted(),
        }))
    }

    async fn accept_gap(
        &self,
        request: Request<proto::AcceptGapRequest>,
    ) -> Result<Response<proto::AcceptGapResponse>, Status> {
        let (admin, _) = opened(request)?;
        Ok(Response::new(self.gap_accepted(&admin).await?))
    }

    async fn settle_order(
        &self,
        request: Request<proto::SettleOrderRequest>,
    ) -> Result<Response<proto::SettleOrderResponse>, Status> {
        let (admin, message) = opened(request)?;
        Ok(Response::new(self.order_settled(&admin, &message).await?))
    }

    async fn accept_clock(
        &self,
        request: Request<proto::AcceptClockRequest>,
    ) -> Result<Response<proto::AcceptClockResponse>, Status> {
        let (admin, message) = opened(request)?;
        let id = self.host_id(&message.host)?;
        let host = host_name(id);
        let accepted = self.broker.clock.accept(id, &admin);
        let refused = accepted.map_err(|_| AdminError::ClockUnknown(id))?;
        let clock = &self.broker.clock;
        let difference_ms = refused.unwrap_or_else(|| clock.exchange(id).ms - clock.wall_ms());
        let apart = clock::difference(difference_ms);
        let note = if refused.is_some() {
            ""
        } else {
            "; nothing changed: the difference is at most 24 hours, or was already accepted"
        };
        let detail = format!("the clock of {host} is {apart}{note}");
        self.record(
            &admin,
            &Act {
                action: "clock-accept",
                outcome: "done",
                detail: Some(detail),
                ..Act::default()
            },
        )
        .await;
        Ok(Response::new(proto::AcceptClockResponse {
            host,
            difference_ms,
            was_refused: refused.is_some(),
        }))
    }
}
