//! The broker's own token: one login at a time, renewed, replaced before it expires, revoked at shutdown.
//!
//! There is no timer: each request checks the lease first. A lease much shorter than the time between two polls is
//! therefore not renewed, but replaced by a new login.

use std::path::Path;

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use serde_json::json;
use tokio::time::Instant;
use vaultrs::api::AuthInfo;
use vaultrs::api::auth::approle::requests::LoginWithApproleRequest;
use vaultrs::api::auth::kubernetes::requests::LoginWithKubernetesRequest;
use vaultrs::api::token::requests::{RenewTokenSelfRequest, RevokeTokenSelfRequest};
use vaultrs::client::VaultClient;
use vaultrs::error::ClientError;
use zeroize::Zeroizing;

use super::connection::{
    VaultConnection, execute_login, execute_only, reduce, reduce_login, status_of,
};
use super::credentials::{Identity, SecretId, checked_token, read_token};
use super::lease::{Due, Lease};
use super::{Auth, BACKOFF, OutageKind, Vault, VaultError};
use crate::base::backoff::Backoff;

/// A token and the connection to use it with.
pub(super) struct AuthToken {
    pub(super) token: Zeroizing<String>,
    connection: VaultConnection,
}

impl AuthToken {
    pub(super) fn client(&self) -> VaultClient {
        self.connection.client(&self.token)
    }

    /// For requests and responses that hold a key.
    pub(super) fn client_for_secrets(&self) -> VaultClient {
        self.connection.client_for_secrets(&self.token)
    }
}

/// The state of the broker's login.
pub(super) struct Session {
    pub(super) connection: VaultConnection,
    /// The client certificate of `connection`, if the login uses one.
    pub(super) identity: Option<Identity>,
    pub(super) secret_id: SecretId,
    token: Option<Token>,
    /// Grows with each login until a request with the new token is accepted; the login itself does not prove that.
    backoff: Backoff,
    next_login: Instant,
    /// The last error, returned until the next login may be tried.
    failure: VaultError,
    is_closed: bool,
}

/// A token from the broker's own login.
struct Token {
    text: Zeroizing<String>,
    lease: Lease,
    /// Renewals in a row that got a 403.
    refusals: u32,
    backoff: Backoff,
    /// Whether Vault has accepted a request with it.
    is_proven: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session(redacted)")
    }
}

impl Session {
    pub(super) fn new(connection: VaultConnection) -> Self {
        Self {
            connection,
            identity: None,
            secret_id: SecretId::default(),
            token: None,
            backoff: BACKOFF,
            next_login: Instant::now(),
            failure: not_accepted(),
            is_closed: false,
        }
    }

    fn due(&self) -> Due {
        let due = |token: &Token| token.lease.due(Instant::now());
        self.token.as_ref().map_or(Due::LogIn, due)
    }

    fn holds(&self, auth: &AuthToken) -> bool {
        let token = self.token.as_ref();
        token.is_some_and(|token| token.text == auth.token)
    }

    /// Makes a login due, since the token cannot be renewed with a new client certificate.
    pub(super) fn replace_token(&mut self) {
        if let Some(token) = &mut self.token {
            token.lease.give_up(Instant::now());
        }
        // No backoff: earlier failures were with the old certificate.
        self.next_login = Instant::now();
    }
}

/// Vault rejects the token, even if it accepted the login.
pub(super) fn not_accepted() -> VaultError {
    OutageKind::Other
        .outage("Vault rejected the token (403); check that token_bound_cidrs includes this machine's address")
}

impl Vault {
    /// A token that should be valid.
    pub(super) async fn auth_token(&self) -> Result<AuthToken, VaultError> {
        if let Auth::TokenFile(file) = &self.settings.auth {
            let token = read_token(file).await?;
            let connection = self.session.lock().await.connection.clone();
            return Ok(AuthToken { token, connection });
        }
        let mut session = self.session.lock().await;
        if session.is_closed {
            return Err(OutageKind::Other.outage("the broker is stopping"));
        }
        if let Auth::Cert {
            certificate, key, ..
        } = &self.settings.auth
        {
            self.follow_identity(&mut session, certificate, key).await?;
        }
        if session.due() == Due::Renew {
            renew(&mut session).await;
        }
        if session.due() == Due::LogIn
            && let Err(error) = self.log_in(&mut session).await
        {
            let has_expired = |token: &Token| token.lease.has_expired(Instant::now());
            if session.token.as_ref().is_none_or(has_expired) {
                session.token = None;
                return Err(error);
            }
            self.metrics.vault_failure("login");
            tracing::warn!(exception.message = %error, "Vault login failed; using current token until it expires");
        }
        let connection = session.connection.clone();
        match &session.token {
            Some(token) => Ok(AuthToken {
                token: token.text.clone(),
                connection,
            }),
            None => Err(session.failure.clone()),
        }
    }

    /// Records that Vault has accepted this token, which ends the backoff of logins.
    pub(super) async fn accepted(&self, auth: &AuthToken) {
        let mut session = self.session.lock().await;
        if !session.holds(auth) {
            return;
        }
        // Once per token: while a proven token is still valid, logins for the next one back off.
        let is_first = |token: &mut Token| !std::mem::replace(&mut token.is_proven, true);
        if session.token.as_mut().is_some_and(is_first) {
            session.backoff.reset();
            session.next_login = Instant::now();
        }
    }

    /// Drops this token, unless another task has already logged in again.
    pub(super) async fn forget(&self, auth: &AuthToken) {
        let mut session = self.session.lock().await;
        if session.holds(auth) {
            session.token = None;
        }
    }

    /// Revokes the token of the broker's own login, after which nothing can be read. A token from a token file is left to
    /// its agent.
    ///
    /// Takes no longer than the timeout of one request.
    pub async fn close(&self) {
        let revoke = async {
            let mut session = self.session.lock().await;
            session.is_closed = true;
            let Some(token) = session.token.take() else {
                return Ok(());
            };
            if token.lease.has_expired(Instant::now()) {
                return Ok(());
            }
            let client = session.connection.client(&token.text);
            let revoked = execute_only(&client, RevokeTokenSelfRequest {}).await;
            revoked.map_err(|error| reduce(&error))
        };
        let problem = match tokio::time::timeout(self.settings.timeout, revoke).await {
            Ok(Ok(())) => return,
            Ok(Err(problem)) => problem.to_string(),
            Err(_) => "Vault did not respond in time".to_owned(),
        };
        tracing::warn!(exception.message = %problem, "Vault token not revoked; it expires with its lease");
    }

    /// Replaces the token by a login; if that fails, the current token stays.
    async fn log_in(&self, session: &mut Session) -> Result<(), VaultError> {
        // Taken before the request is sent, so that the lease is never assumed longer than it is.
        let start = Instant::now();
        let found = match &self.settings.auth {
            Auth::AppRole {
                mount,
                role_id,
                secret_id_file,
                wrapped_for: None,
            } => {
                let secret_id = read_token(secret_id_file).await?;
                session.may_log_in()?;
                session.log_in_by_approle(mount, role_id, &secret_id).await
            }
            Auth::AppRole {
                mount,
                role_id,
                secret_id_file,
                wrapped_for: Some(role),
            } => {
                session.may_log_in()?;
                let path = format!("auth/{mount}/role/{role}/secret-id");
                let Session {
                    connection,
                    secret_id,
                    ..
                } = &mut *session;
                let secret_id = secret_id.unwrapped(connection, secret_id_file, &path).await;
                let secret_id = secret_id.map_err(|error| session.failed(error))?;
                session.log_in_by_approle(mount, role_id, &secret_id).await
            }
            Auth::Cert { mount, role, .. } => {
                session.may_log_in()?;
                let (mount, role) = (mount.clone(), role.clone());
                let client = session.connection.client("");
                execute_login(&client, CertLogin { mount, role }).await
            }
            Auth::Kubernetes {
                mount,
                role,
                jwt_file,
            } => {
                let jwt = read_token(jwt_file).await?;
                session.may_log_in()?;
                let client = session.connection.client("");
                let request = LoginWithKubernetesRequest {
                    mount: mount.clone(),
                    role: role.clone(),
                    jwt: jwt.to_string(),
                };
                execute_login(&client, request).await
            }
            // Not reached: a token file needs no login.
            Auth::TokenFile(_) => return Err(not_accepted()),
        };
        session.store_token(start, found)
    }

    /// Updates the connection to the client certificate in the files.
    ///
    /// If the files cannot be used, the current certificate stays: the two files do not change at the same moment.
    async fn follow_identity(
        &self,
        session: &mut Session,
        certificate: &Path,
        key: &Path,
    ) -> Result<(), VaultError> {
        let connection = match self.changed(session, certificate, key).await {
            Ok(None) => return Ok(()),
            Ok(Some(connection)) => connection,
            Err(reason) if session.identity.is_some() => {
                tracing::warn!(exception.message = %reason, "cannot reload the client certificate for Vault; still using the current one");
                return Ok(());
            }
            Err(reason) => {
                return Err(OutageKind::Other.outage(format!(
                    "cannot use the client certificate in vault.auth: {reason}"
                )));
            }
        };
        session.connection = connection;
        session.replace_token();
        Ok(())
    }

    /// A connection with the certificate in the files, if it has changed.
    async fn changed(
        &self,
        session: &mut Session,
        certificate: &Path,
        key: &Path,
    ) -> Result<Option<VaultConnection>, String> {
        let found = Identity::read(certificate, key).await?;
        if session.identity.as_ref() == Some(&found) {
            return Ok(None);
        }
        let tls = found.tls(&self.tls)?;
        let connection =
            VaultConnection::new(&self.settings, tls).map_err(|error| error.to_string())?;
        session.identity = Some(found);
        Ok(Some(connection))
    }
}

impl Session {
    /// Counts a login attempt; during the backoff, returns the last error instead.
    fn may_log_in(&mut self) -> Result<(), VaultError> {
        let now = Instant::now();
        if now < self.next_login {
            return Err(self.failure.clone());
        }
        self.next_login = now + self.backoff.wait();
        Ok(())
    }

    async fn log_in_by_approle(
        &self,
        mount: &str,
        role_id: &str,
        secret_id: &str,
    ) -> Result<AuthInfo, ClientError> {
        let request = LoginWithApproleRequest {
            mount: mount.to_owned(),
            role_id: role_id.to_owned(),
            secret_id: secret_id.to_owned(),
        };
        execute_login(&self.connection.client(""), request).await
    }

    fn failed(&mut self, error: VaultError) -> VaultError {
        self.failure = error.clone();
        error
    }

    /// Stores the token of a login, or its error.
    fn store_token(
        &mut self,
        start: Instant,
        found: Result<AuthInfo, ClientError>,
    ) -> Result<(), VaultError> {
        let found = found.map_err(|error| self.failed(reduce_login(&error)))?;
        let text = checked_token(&Zeroizing::new(found.client_token))?;
        let lease = Lease::new(start, found.lease_duration, found.renewable);
        tracing::info!(
            lease_s = found.lease_duration,
            renewable = found.renewable,
            "logged in to Vault"
        );
        self.failure = not_accepted();
        self.token = Some(Token {
            text,
            lease,
            refusals: 0,
            backoff: BACKOFF,
            is_proven: false,
        });
        Ok(())
    }
}

/// Renews the token. If that fails, the token stays, and the renewal is repeated later or a login becomes due.
async fn renew(session: &mut Session) {
    let Some(token) = &mut session.token else {
        return;
    };
    let client = session.connection.client(&token.text);
    let start = Instant::now();
    // Without an increment: it could only request less than the role grants.
    let request = RenewTokenSelfRequest { increment: None };
    let found = match execute_login(&client, request).await {
        Ok(found) => found,
        Err(error) => {
            let status = status_of(&error);
            token.refusals = if status == Some(403) {
                token.refusals + 1
            } else {
                0
            };
            // 400: the token is not renewable, or the client certificate is not that of the login.
            if status == Some(400) || token.refusals == 2 {
                token.lease.give_up(Instant::now());
            } else {
                token.lease.put_off(Instant::now() + token.backoff.wait());
            }
            tracing::warn!(exception.message = %reduce(&error), "Vault token renewal failed");
            return;
        }
    };
    drop(Zeroizing::new(found.client_token));
    token.lease = token
        .lease
        .renewed(start, found.lease_duration, found.renewable);
    token.refusals = 0;
    token.backoff.reset();
    tracing::debug!(lease_s = found.lease_duration, "Vault token renewed");
}

/// `POST auth/<mount>/login`. The library has it too, but sends the role as `cert_name`, which servers do not read.
struct CertLogin {
    mount: String,
    role: Option<String>,
}

impl Endpoint for CertLogin {
    type Response = ();
    const REQUEST_BODY_TYPE: RequestType = RequestType::JSON;
    const RESPONSE_BODY_TYPE: ResponseType = ResponseType::JSON;

    fn path(&self) -> String {
        format!("/auth/{}/login", self.mount)
    }

    fn method(&self) -> RequestMethod {
        RequestMethod::POST
    }

    fn body(&self) -> Result<Option<Vec<u8>>, rustify::errors::ClientError> {
        let body = match &self.role {
            Some(role) => json!({ "name": role }),
            None => json!({}),
        };
        Ok(Some(body.to_string().into_bytes()))
    }
}
