//! The broker's own token: one login at a time, renewed, replaced before it ends, revoked at the stop.
//!
//! Whoever needs a token drives this: each poll of a key looks at the lease. A lease much shorter than the time between
//! two polls is therefore not renewed, and a new login takes its place.

use std::path::Path;

use rustify::endpoint::Endpoint;
use rustify::enums::{RequestMethod, RequestType, ResponseType};
use serde_json::json;
use tokio::time::Instant;
use vaultrs::api::AuthInfo;
use vaultrs::client::VaultClient;
use vaultrs::error::ClientError;
use zeroize::Zeroizing;

use super::connection::{VaultConnection, reduce, reduce_login, status_of};
use super::credentials::{Identity, SecretId, checked_token, read_token};
use super::lease::{Due, Lease};
use super::{Auth, BACKOFF, OutageKind, Vault, VaultError};
use crate::base::backoff::Backoff;

/// A token and the connection to use it on.
pub(super) struct AuthToken {
    pub(super) token: Zeroizing<String>,
    connection: VaultConnection,
}

impl AuthToken {
    pub(super) fn client(&self) -> VaultClient {
        self.connection.client(&self.token)
    }

    /// For requests and answers that hold a key.
    pub(super) fn client_for_secrets(&self) -> VaultClient {
        self.connection.client_for_secrets(&self.token)
    }
}

/// What is known of the broker's login.
pub(super) struct Session {
    pub(super) connection: VaultConnection,
    /// What `connection` shows Vault, where the login is by certificate.
    pub(super) identity: Option<Identity>,
    pub(super) secret_id: SecretId,
    token: Option<Token>,
    /// Grows with each login until a token is accepted, which the login itself does not prove.
    backoff: Backoff,
    next_login: Instant,
    /// Why there is no token while no login may be tried.
    failure: VaultError,
    is_closed: bool,
}

/// A token of our own login.
struct Token {
    text: Zeroizing<String>,
    lease: Lease,
    /// Renewals in a row that were answered 403.
    refusals: u32,
    backoff: Backoff,
    /// Whether Vault has accepted it for a request.
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

    fn holds(&self, pass: &AuthToken) -> bool {
        let token = self.token.as_ref();
        token.is_some_and(|token| token.text == pass.token)
    }

    /// The connection has another certificate now, with which the token cannot be renewed.
    pub(super) fn replace_token(&mut self) {
        if let Some(token) = &mut self.token {
            token.lease.give_up(Instant::now());
        }
        // The new certificate is no repetition of what failed with the old one.
        self.next_login = Instant::now();
    }
}

/// Vault takes logins, perhaps, but not their tokens.
pub(super) fn not_accepted() -> VaultError {
    OutageKind::Other
        .outage("Vault does not accept our token (403); is this address in token_bound_cidrs?")
}

impl Vault {
    /// A token that should be valid.
    pub(super) async fn pass(&self) -> Result<AuthToken, VaultError> {
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
            let has_ended = |token: &Token| token.lease.has_ended(Instant::now());
            if session.token.as_ref().is_none_or(has_ended) {
                session.token = None;
                return Err(error);
            }
            self.metrics.vault_failure("login");
            tracing::warn!(reason = %error, "Vault token is about to expire and login fails");
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

    /// Vault has taken this token for good: the login that got it needs no backoff any more.
    pub(super) async fn accepted(&self, pass: &AuthToken) {
        let mut session = self.session.lock().await;
        if !session.holds(pass) {
            return;
        }
        // Once for each token: while a proven token is still good, logins for the next one back off.
        let is_first = |token: &mut Token| !std::mem::replace(&mut token.is_proven, true);
        if session.token.as_mut().is_some_and(is_first) {
            session.backoff.reset();
            session.next_login = Instant::now();
        }
    }

    /// Gives up the login that got this token, unless another key has already logged in again.
    pub(super) async fn forget(&self, pass: &AuthToken) {
        let mut session = self.session.lock().await;
        if session.holds(pass) {
            session.token = None;
        }
    }

    /// Revokes the token of our own login; nothing more can be read after that. A token file is its agent's affair.
    ///
    /// Takes no longer than one request may.
    pub async fn close(&self) {
        let revoke = async {
            let mut session = self.session.lock().await;
            session.is_closed = true;
            let Some(token) = session.token.take() else {
                return Ok(());
            };
            if token.lease.has_ended(Instant::now()) {
                return Ok(());
            }
            let client = session.connection.client(&token.text);
            let revoked = vaultrs::token::revoke_self(&client).await;
            revoked.map_err(|error| reduce(&error))
        };
        let problem = match tokio::time::timeout(self.settings.timeout, revoke).await {
            Ok(Ok(())) => return,
            Ok(Err(problem)) => problem.to_string(),
            Err(_) => "Vault did not answer in time".to_owned(),
        };
        tracing::warn!(reason = %problem, "Vault token not revoked; it expires with its lease");
    }

    /// Gets a token in place of the one there is, which stays if that fails.
    async fn log_in(&self, session: &mut Session) -> Result<(), VaultError> {
        // Before it is sent, so that the lease is never thought longer than it is.
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
                let client = session.connection.client("");
                vaultrs::auth::approle::login(&client, mount, role_id, &secret_id).await
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
                let client = session.connection.client("");
                vaultrs::auth::approle::login(&client, mount, role_id, &secret_id).await
            }
            Auth::Cert { mount, role, .. } => {
                session.may_log_in()?;
                let (mount, role) = (mount.clone(), role.clone());
                let client = session.connection.client("");
                vaultrs::api::auth(&client, CertLogin { mount, role }).await
            }
            Auth::Kubernetes {
                mount,
                role,
                jwt_file,
            } => {
                let jwt = read_token(jwt_file).await?;
                session.may_log_in()?;
                let client = session.connection.client("");
                vaultrs::auth::kubernetes::login(&client, mount, role, &jwt).await
            }
            // Never called for it: there is no login.
            Auth::TokenFile(_) => return Err(not_accepted()),
        };
        session.take(start, found)
    }

    /// Makes the connection show the certificate that stands in the files.
    ///
    /// What cannot be used is no reason to give up the one in use: the two files do not change at the same moment.
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
                tracing::warn!(%reason, "cannot reload the client certificate for Vault; keeping current");
                return Ok(());
            }
            Err(reason) => {
                return Err(OutageKind::Other.outage(format!(
                    "the certificate of vault.auth cannot be used: {reason}"
                )));
            }
        };
        session.connection = connection;
        session.replace_token();
        Ok(())
    }

    /// A connection with the certificate in the files, where that is not the one in use.
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
    /// Counts a login; until the backoff is over there is none, but what the last one met.
    fn may_log_in(&mut self) -> Result<(), VaultError> {
        let now = Instant::now();
        if now < self.next_login {
            return Err(self.failure.clone());
        }
        self.next_login = now + self.backoff.wait();
        Ok(())
    }

    fn failed(&mut self, error: VaultError) -> VaultError {
        self.failure = error.clone();
        error
    }

    fn take(
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

/// Renews the token there is. If that fails the token stays, and it is tried again later or given up.
async fn renew(session: &mut Session) {
    let Some(token) = &mut session.token else {
        return;
    };
    let client = session.connection.client(&token.text);
    let start = Instant::now();
    // Without an increment: it could only ask for less than the role gives.
    let found = match vaultrs::token::renew_self(&client, None).await {
        Ok(found) => found,
        Err(error) => {
            let status = status_of(&error);
            token.refusals = if status == Some(403) {
                token.refusals + 1
            } else {
                0
            };
            // 400: not renewable after all, or the certificate is not that of the login.
            if status == Some(400) || token.refusals == 2 {
                token.lease.give_up(Instant::now());
            } else {
                token.lease.put_off(Instant::now() + token.backoff.wait());
            }
            tracing::warn!(reason = %reduce(&error), "Vault token renewal failed");
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
