//! `Admin`: keys, accounts and bots, as admins see and change them. Proto in, proto out; no answer holds a secret.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::proto::admin_server::Admin;
use super::proto::{self, KeyState};
use super::status::{DOMAIN, add_violations, cut};
use crate::broker::Broker;
use crate::ids::{AccountId, AdminId, BotId, KeyName};
use crate::keyring::{KeyStatus, Slot};
use crate::kucoin::{Malformed, Scope};
use crate::policy::Account;

/// Why an admin's call failed. `Display` is one sentence for the admin.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The rules do not name it.
    #[error("the rules name no account {0}; `credbroker keys list` shows those that there are")]
    AccountUnknown(AccountId),
    /// The CA of the caller's certificate was taken away, or its time is over.
    #[error("the certificate of this connection has ended, or its CA is trusted no longer")]
    CallerUnknown,
    /// A defect of the broker.
    #[error("the broker failed; its log and the audit file tell how far it came")]
    Internal,
    /// The account has none of this name.
    #[error("account {0} has no key {1} in the rules")]
    KeyUnknown(AccountId, KeyName),
    /// Fields that are not as they must be.
    #[error("the call is malformed: {}", .0.iter().map(|one| format!("{}: {}", one.field, one.problem)).collect::<Vec<_>>().join("; "))]
    Malformed(Vec<Malformed>),
    /// It did not arrive in time.
    #[error("the call did not arrive whole within {} ms; nothing was done", .0.as_millis())]
    Slow(Duration),
}

impl AdminError {
    fn field(field: &str, problem: impl std::fmt::Display) -> Self {
        Self::Malformed(vec![Malformed::new(field, problem)])
    }

    /// `ErrorInfo.reason`, and the gRPC code that goes with it.
    fn reason(&self) -> (&'static str, Code) {
        match self {
            Self::AccountUnknown(_) => ("ACCOUNT_UNKNOWN", Code::NotFound),
            Self::CallerUnknown => ("CALLER_UNKNOWN", Code::Unauthenticated),
            Self::Internal => ("INTERNAL", Code::Internal),
            Self::KeyUnknown(..) => ("KEY_UNKNOWN", Code::NotFound),
            Self::Malformed(_) => ("REQUEST_MALFORMED", Code::InvalidArgument),
            Self::Slow(_) => ("DEADLINE_EXCEEDED", Code::DeadlineExceeded),
        }
    }
}

impl From<AdminError> for Status {
    fn from(error: AdminError) -> Self {
        let (reason, code) = error.reason();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, []);
        if let AdminError::Malformed(problems) = &error {
            add_violations(&mut details, problems);
        }
        Self::with_error_details(code, cut(&error.to_string()), details)
    }
}

/// The service.
#[derive(Debug)]
pub struct AdminApi {
    broker: Arc<Broker>,
}

impl AdminApi {
    /// Opens the door to `broker`.
    pub fn new(broker: Arc<Broker>) -> Self {
        Self { broker }
    }

    /// The account of this name in the rules.
    fn account(&self, name: &str) -> Result<Arc<Account>, AdminError> {
        let id: AccountId = name
            .parse()
            .map_err(|error| AdminError::field("account", error))?;
        let policy = self.broker.policy();
        let found = policy.accounts().find(|account| account.id == id).cloned();
        found.ok_or(AdminError::AccountUnknown(id))
    }

    /// A key of one account; without a name its only one.
    fn key(&self, account: &str, name: &str) -> Result<(Arc<Account>, KeyName), AdminError> {
        let account = self.account(account)?;
        if name.is_empty() {
            let mut names: Vec<_> = account.keys.values().collect();
            names.dedup();
            return match names.as_slice() {
                [only] => Ok((Arc::clone(&account), (*only).clone())),
                names => {
                    let names: Vec<_> = names.iter().map(|name| name.as_str()).collect();
                    let problem = format!("name one of the account's keys: {}", names.join(", "));
                    Err(AdminError::field("key", problem))
                }
            };
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

    fn state(&self, key: KeyStatus) -> KeyState {
        let policy = self.broker.policy();
        let account = policy.accounts().find(|account| account.id == key.account);
        let keys = account.iter().flat_map(|account| &account.keys);
        let scopes = keys
            .filter(|(_, name)| **name == key.name)
            .map(|(scope, _)| proto::Scope::from(*scope).into());
        let mut reasons = Vec::new();
        let (status, version) = match key.slot {
            Slot::Gone(reason) => {
                reasons.push(reason);
                ("unavailable", 0)
            }
            Slot::Ready {
                version,
                problem,
                outage,
                ..
            } => {
                reasons.extend(
                    problem.map(|problem| format!("a newer version is not used: {problem}")),
                );
                if let (Some(outage), Some(age)) = (outage, key.age) {
                    let age_s = age.as_secs();
                    reasons.push(format!("Vault last confirmed it {age_s} s ago: {outage}"));
                }
                if key.is_too_old {
                    reasons.push("too old for what adds risk; cancels and reads go on".to_owned());
                }
                let status = if reasons.is_empty() {
                    "untested"
                } else {
                    "degraded"
                };
                (status, version)
            }
            Slot::Waiting(reason) => {
                reasons.push(format!("waiting for Vault: {reason}"));
                ("unavailable", 0)
            }
        };
        KeyState {
            account: key.account.to_string(),
            key: key.name.to_string(),
            scopes: scopes.collect(),
            status: status.to_owned(),
            reasons,
            version,
            ..KeyState::default()
        }
    }
}

impl From<Scope> for proto::Scope {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::Futures => Self::Futures,
            Scope::SpotMargin => Self::SpotMargin,
            Scope::Unified => Self::Unified,
        }
    }
}

/// Who calls, and what was said.
fn opened<T>(request: Request<T>) -> Result<(AdminId, T), AdminError> {
    // The listener lets no connection in without an admin's certificate.
    let admin = request.extensions().get::<AdminId>().cloned();
    Ok((admin.ok_or(AdminError::Internal)?, request.into_inner()))
}

fn bot(name: &str) -> Result<BotId, AdminError> {
    name.parse()
        .map_err(|error| AdminError::field("bot", error))
}

/// Either an account or all of them must be meant, and said.
fn is_all(account: &str, all: bool) -> Result<bool, AdminError> {
    match (account.is_empty(), all) {
        (true, false) => Err(AdminError::field(
            "account",
            "expected an account, or `all`",
        )),
        (false, true) => Err(AdminError::field(
            "all",
            "stands beside an account; expected one of them",
        )),
        (_, all) => Ok(all),
    }
}

// TODO: all but `list_keys` check what they are given and do nothing yet: they need tests of keys, restrictions and calls
// by admins; until then they answer UNIMPLEMENTED.
#[tonic::async_trait]
impl Admin for AdminApi {
    async fn test_key(
        &self,
        request: Request<proto::TestKeyRequest>,
    ) -> Result<Response<proto::TestKeyResponse>, Status> {
        let (_admin, message) = opened(request)?;
        self.key(&message.account, &message.key)?;
        Err(Status::unimplemented("TestKey"))
    }

    async fn list_keys(
        &self,
        _request: Request<proto::ListKeysRequest>,
    ) -> Result<Response<proto::ListKeysResponse>, Status> {
        let keys = self.broker.keyring.status().into_iter();
        let keys = keys.map(|key| self.state(key)).collect();
        Ok(Response::new(proto::ListKeysResponse { keys }))
    }

    async fn refresh_key(
        &self,
        request: Request<proto::RefreshKeyRequest>,
    ) -> Result<Response<proto::RefreshKeyResponse>, Status> {
        let (_admin, message) = opened(request)?;
        self.key(&message.account, &message.key)?;
        Err(Status::unimplemented("RefreshKey"))
    }

    async fn revoke_key(
        &self,
        request: Request<proto::RevokeKeyRequest>,
    ) -> Result<Response<proto::RevokeKeyResponse>, Status> {
        let (_admin, message) = opened(request)?;
        self.account(&message.account)?;
        Err(Status::unimplemented("RevokeKey"))
    }

    async fn freeze_account(
        &self,
        request: Request<proto::FreezeAccountRequest>,
    ) -> Result<Response<proto::FreezeAccountResponse>, Status> {
        let (_admin, message) = opened(request)?;
        self.account(&message.account)?;
        Err(Status::unimplemented("FreezeAccount"))
    }

    async fn thaw_account(
        &self,
        request: Request<proto::ThawAccountRequest>,
    ) -> Result<Response<proto::ThawAccountResponse>, Status> {
        let (_admin, message) = opened(request)?;
        self.account(&message.account)?;
        Err(Status::unimplemented("ThawAccount"))
    }

    async fn block_bot(
        &self,
        request: Request<proto::BlockBotRequest>,
    ) -> Result<Response<proto::BlockBotResponse>, Status> {
        let (_admin, message) = opened(request)?;
        bot(&message.bot)?;
        Err(Status::unimplemented("BlockBot"))
    }

    async fn unblock_bot(
        &self,
        request: Request<proto::UnblockBotRequest>,
    ) -> Result<Response<proto::UnblockBotResponse>, Status> {
        let (_admin, message) = opened(request)?;
        bot(&message.bot)?;
        Err(Status::unimplemented("UnblockBot"))
    }

    async fn halt(
        &self,
        request: Request<proto::HaltRequest>,
    ) -> Result<Response<proto::HaltResponse>, Status> {
        let (_admin, message) = opened(request)?;
        if !is_all(&message.account, message.all)? {
            self.account(&message.account)?;
        }
        Err(Status::unimplemented("Halt"))
    }

    async fn resume(
        &self,
        request: Request<proto::ResumeRequest>,
    ) -> Result<Response<proto::ResumeResponse>, Status> {
        let (_admin, message) = opened(request)?;
        if !is_all(&message.account, message.all)? {
            self.account(&message.account)?;
        }
        Err(Status::unimplemented("Resume"))
    }
}
