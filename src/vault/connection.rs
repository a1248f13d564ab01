//! One hardened HTTP client, and errors without secrets.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use rustify::endpoint::Endpoint;
use rustls::ClientConfig;
use serde_json::Value;
use url::Url;
use vaultrs::api::{AuthInfo, EndpointError, EndpointMiddleware, EndpointResult};
use vaultrs::client::{VaultClient, VaultClientSettings};
use vaultrs::error::ClientError;

use super::{OutageKind, VaultError, VaultSettings};
use crate::base::text::clean;
use crate::base::trust::{PresentsCa, is_caused_by_presented_ca};

/// How many attempts a node gets that does not have the last write yet.
const TRIES_BEHIND: usize = 3;

/// How many characters of Vault's error texts are kept.
const MAX_TEXT: usize = 500;

/// Bytes of the longest response that is read; a key, or the metadata of a key, has a few kilobytes.
const MAX_RESPONSE: usize = 1024 * 1024;

/// A response has more than [`MAX_RESPONSE`] bytes.
#[derive(Debug, thiserror::Error)]
#[error("response has more than {MAX_RESPONSE} bytes")]
struct ResponseTooLarge;

/// The longest wait between two of these attempts.
const CATCH_UP: Duration = Duration::from_millis(500);

/// An HTTP client for Vault, with or without a client certificate.
#[derive(Clone, Debug)]
pub(super) struct VaultConnection {
    address: Url,
    http: reqwest::Client,
    /// Keeps no idle connections: their buffers still hold the last response.
    http_for_secrets: reqwest::Client,
    namespace: Option<String>,
    timeout: Duration,
}

impl VaultConnection {
    /// Sends nothing yet. Fails when the TLS library rejects the configuration.
    pub(super) fn new(settings: &VaultSettings, tls: ClientConfig) -> Result<Self, reqwest::Error> {
        let allowed: Vec<_> = settings
            .redirects
            .iter()
            .chain([&settings.address])
            .map(Url::origin)
            .collect();
        let may_follow = move |attempt: &reqwest::redirect::Attempt<'_>| {
            attempt.status() == http::StatusCode::TEMPORARY_REDIRECT
                && attempt.previous().len() == 1
                && attempt
                    .previous()
                    .first()
                    .is_some_and(|first| first.scheme() == attempt.url().scheme())
                && allowed.contains(&attempt.url().origin())
        };
        let build = |tls: ClientConfig, idle_connections| {
            let may_follow = may_follow.clone();
            let redirects = reqwest::redirect::Policy::custom(move |attempt| {
                if may_follow(&attempt) {
                    attempt.follow()
                } else {
                    attempt.stop()
                }
            });
            reqwest::Client::builder()
                .tls_backend_preconfigured(tls)
                .connect_timeout(settings.timeout.min(Duration::from_secs(1)))
                .timeout(settings.timeout)
                .redirect(redirects)
                .no_proxy()
                .pool_max_idle_per_host(idle_connections)
                .build()
        };
        Ok(Self {
            address: settings.address.clone(),
            http: build(tls.clone(), usize::MAX)?,
            http_for_secrets: build(tls, 0)?,
            namespace: settings.namespace.clone(),
            timeout: settings.timeout,
        })
    }

    /// A vaultrs client that sends `token`, or no token if it is empty.
    pub(super) fn client(&self, token: &str) -> VaultClient {
        self.client_over(&self.http, token)
    }

    /// The same, for requests and responses that hold a key: each connection closes after use.
    pub(super) fn client_for_secrets(&self, token: &str) -> VaultClient {
        self.client_over(&self.http_for_secrets, token)
    }

    /// Sets every field, because the builder of these settings reads the environment.
    fn client_over(&self, http: &reqwest::Client, token: &str) -> VaultClient {
        let address = self.address.clone();
        let http = rustify::clients::reqwest::Client::new(address.as_str(), http.clone());
        let settings = VaultClientSettings {
            address,
            ca_certs: Vec::new(),
            identity: None,
            timeout: Some(self.timeout),
            token: String::new(),
            verify: true,
            version: 1,
            wrapping: false,
            namespace: self.namespace.clone(),
            proxy: None,
        };
        let middle = EndpointMiddleware {
            token: token.to_owned(),
            version: "v1".to_owned(),
            wrap: None,
            namespace: self.namespace.clone(),
        };
        VaultClient {
            http,
            middle,
            settings,
        }
    }
}

/// Repeats a request that gets a 412: the node does not have the last write yet.
pub(super) async fn repeat_while_behind<T, F>(request: impl Fn() -> F) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, ClientError>>,
{
    for _ in 1..TRIES_BEHIND {
        match request().await {
            Err(error) if status_of(&error) == Some(412) => {
                tokio::time::sleep(CATCH_UP.mul_f64(fastrand::f64())).await;
            }
            other => return other,
        }
    }
    request().await
}

/// None if Vault has no such path; a missing mount or namespace is an error.
pub(super) fn if_exists<T>(found: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match found {
        Err(ClientError::APIError { code: 404, errors }) if errors.is_empty() => Ok(None),
        found => found.map(Some),
    }
}

/// Executes a request and returns `data` of its response. The functions of vaultrs read a response of any size.
pub(super) async fn execute<E: Endpoint>(
    client: &VaultClient,
    endpoint: E,
) -> Result<E::Response, ClientError> {
    let found = envelope(client, endpoint).await?;
    found.data.ok_or(ClientError::ResponseDataEmptyError)
}

/// The same for a request that returns a token.
pub(super) async fn execute_login<E: Endpoint<Response = ()>>(
    client: &VaultClient,
    endpoint: E,
) -> Result<AuthInfo, ClientError> {
    let found = envelope(client, endpoint).await?;
    found.auth.ok_or(ClientError::ResponseEmptyError)
}

/// The same for a request whose response does not matter.
pub(super) async fn execute_only<E: Endpoint>(
    client: &VaultClient,
    endpoint: E,
) -> Result<(), ClientError> {
    send(client, request_of(client, endpoint)?).await.map(drop)
}

/// The request of an endpoint, with the token of `client`.
fn request_of(
    client: &VaultClient,
    endpoint: impl Endpoint,
) -> Result<reqwest::Request, rustify::errors::ClientError> {
    let request = endpoint
        .with_middleware(&client.middle)
        .request(&client.http.base)?;
    reqwest::Request::try_from(request)
        .map_err(|source| rustify::errors::ClientError::ReqwestBuildError { source })
}

async fn envelope<E: Endpoint>(
    client: &VaultClient,
    endpoint: E,
) -> Result<EndpointResult<E::Response>, ClientError> {
    let body = send(client, request_of(client, endpoint)?).await?;
    serde_json::from_slice(&body).map_err(|error| {
        // Without the content, which may be secret.
        let (source, content) = (error.into(), None);
        rustify::errors::ClientError::ResponseParseError { source, content }.into()
    })
}

/// Posts JSON with the token of `client` and returns the `data` of the response, if it has any.
///
/// Does not use vaultrs, so that the owner of `body` can wipe it; errors have the types of vaultrs.
pub(super) async fn post(
    client: &VaultClient,
    path: &str,
    body: Bytes,
) -> Result<Option<Value>, ClientError> {
    let url = format!("{}v1/{path}", client.settings.address);
    let mut request = (client.http.http.post(&url))
        .header("x-vault-request", "true")
        .header("x-vault-token", sensitive(&client.middle.token)?)
        .header(CONTENT_TYPE, "application/json")
        .body(body);
    if let Some(namespace) = &client.settings.namespace {
        request = request.header("x-vault-namespace", namespace);
    }
    let request = request
        .build()
        .map_err(|source| rustify::errors::ClientError::ReqwestBuildError { source })?;
    let body = send(client, request).await?;
    if body.is_empty() {
        return Ok(None);
    }
    let answer: Option<EndpointResult<Value>> = serde_json::from_slice(&body).ok();
    answer
        .map(|answer| answer.data)
        .ok_or(ClientError::ResponseEmptyError)
}

/// Sends a request and returns the body of its response, which has at most [`MAX_RESPONSE`] bytes.
async fn send(client: &VaultClient, request: reqwest::Request) -> Result<Vec<u8>, ClientError> {
    use rustify::errors::ClientError as RestError;
    let (url, method) = (request.url().to_string(), request.method().to_string());
    let failed = |error: reqwest::Error| RestError::RequestError {
        source: error.without_url().into(),
        url,
        method,
    };
    let mut answer = client.http.http.execute(request).await.map_err(failed)?;
    let broken_off = |error: reqwest::Error| RestError::ResponseError {
        source: error.without_url().into(),
    };
    let mut body = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(broken_off)? {
        if part.len() > MAX_RESPONSE - body.len() {
            let source = ResponseTooLarge.into();
            return Err(RestError::ResponseError { source }.into());
        }
        body.extend_from_slice(&part);
    }
    if answer.status().is_success() {
        return Ok(body);
    }
    let code = answer.status().as_u16();
    if let Ok(EndpointError { errors }) = serde_json::from_slice(&body) {
        return Err(ClientError::APIError { code, errors });
    }
    let content = String::from_utf8(body).ok();
    Err(RestError::ServerResponseError { code, content }.into())
}

fn sensitive(token: &str) -> Result<HeaderValue, ClientError> {
    // Tokens are checked before a client is made, so this does not fail.
    let mut token = HeaderValue::from_str(token).map_err(|_| ClientError::ResponseEmptyError)?;
    token.set_sensitive(true);
    Ok(token)
}

/// Whether the request may have taken effect, or may still do so. False if Vault certainly did not get it, or returned
/// that it did not do it.
pub(super) fn may_be_done(error: &ClientError) -> bool {
    match (status_of(error), error) {
        (Some(503), _) => !is_vaults_own(error),
        (Some(status), _) => status >= 500,
        (
            None,
            ClientError::RestClientError {
                source: rustify::errors::ClientError::RequestError { source, .. },
            },
        ) => !source
            .downcast_ref::<reqwest::Error>()
            .is_some_and(reqwest::Error::is_connect),
        (None, _) => true,
    }
}

/// The HTTP status, which the library returns in one of two forms.
pub(super) fn status_of(error: &ClientError) -> Option<u16> {
    match error {
        ClientError::APIError { code, .. }
        | ClientError::RestClientError {
            source: rustify::errors::ClientError::ServerResponseError { code, .. },
        } => Some(*code),
        _ => None,
    }
}

/// Whether a policy denied the request. For an invalid token, or one from outside its bound addresses, Vault returns a 403
/// with a different text.
pub(super) fn is_by_policy(error: &ClientError) -> bool {
    let ClientError::APIError { code: 403, errors } = error else {
        return false;
    };
    matches!(errors.as_slice(), [text] if text == "1 error occurred:\n\t* permission denied\n\n")
}

/// Whether Vault itself wrote this error, and not a proxy in front of it.
pub(super) fn is_vaults_own(error: &ClientError) -> bool {
    match error {
        // It holds Vault's list of error texts.
        ClientError::APIError { .. } => true,
        // For a deleted version, Vault returns the envelope of an ordinary response.
        ClientError::RestClientError {
            source:
                rustify::errors::ClientError::ServerResponseError {
                    content: Some(body),
                    ..
                },
        } => serde_json::from_str::<serde_json::Map<String, Value>>(body)
            .is_ok_and(|body| body.contains_key("request_id")),
        _ => false,
    }
}

/// Vault's error texts, on one line that is short enough for a log.
pub(super) fn texts_of(error: &ClientError) -> String {
    match error {
        ClientError::APIError { errors, .. } => clean(&errors.join("; "), MAX_TEXT).into_owned(),
        _ => String::new(),
    }
}

/// Converts an error of the library to one without secrets: never a body, never a token.
pub(super) fn reduce(error: &ClientError) -> VaultError {
    let texts = texts_of(error);
    match status_of(error) {
        Some(status @ (403 | 404)) if !is_vaults_own(error) => OutageKind::NotVault.outage(
            format!("HTTP {status} response is not in Vault's format; check for a proxy in front of Vault"),
        ),
        Some(404) if texts.is_empty() => VaultError::no_such_key(),
        Some(404) => VaultError::Gone(format!(
            "Vault has no such mount or namespace (404: {texts})"
        )),
        Some(403) => VaultError::Denied,
        Some(503) => OutageKind::Sealed.outage("Vault is sealed or not initialised (503)"),
        Some(status) => {
            let kind = if status >= 500 {
                OutageKind::Server
            } else {
                OutageKind::Other
            };
            kind.outage(format!("Vault returned {status}: {texts}"))
        }
        None if is_caused_by_presented_ca(error) => {
            OutageKind::Unreachable.outage(format!("cannot reach Vault: {PresentsCa}"))
        }
        None => match error {
            ClientError::RestClientError {
                source: rustify::errors::ClientError::RequestError { .. },
            } => OutageKind::Unreachable.outage("cannot reach Vault"),
            ClientError::RestClientError {
                source: rustify::errors::ClientError::ResponseError { source },
            } if source.is::<ResponseTooLarge>() => OutageKind::NotVault.outage(format!(
                "{ResponseTooLarge}; check for a proxy in front of Vault"
            )),
            ClientError::RestClientError {
                source: rustify::errors::ClientError::ResponseError { source },
            } if source
                .downcast_ref::<reqwest::Error>()
                .is_some_and(reqwest::Error::is_timeout) =>
            {
                OutageKind::Unreachable
                    .outage("response was not complete within vault.timeout_ms")
            }
            _ => OutageKind::NotVault.outage("response is not in Vault's format"),
        },
    }
}

/// The same for the error of a login, which never affects the keys.
///
/// Vault also returns 403 if it cannot reach Kubernetes; 412 and 429 are temporary.
pub(super) fn reduce_login(error: &ClientError) -> VaultError {
    match (status_of(error), reduce(error)) {
        (Some(status @ 400..=499), _) if !matches!(status, 412 | 429) && is_vaults_own(error) => {
            let texts = texts_of(error);
            VaultError::LoginRefused(format!("login: Vault returned {status}: {texts}"))
        }
        (_, other) => other.during("login"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outage_kind_follows_from_the_response() {
        let errors = vec!["x".to_owned()];
        for (code, kind) in [
            (429, OutageKind::Other),
            (500, OutageKind::Server),
            (502, OutageKind::Server),
            (503, OutageKind::Sealed),
        ] {
            let errors = errors.clone();
            let error = reduce(&ClientError::APIError { code, errors });
            assert!(
                matches!(&error, VaultError::Outage(outage) if outage.kind == kind),
                "{code}: {error:?}"
            );
            // A login error keeps the kind.
            let during = error.during("login");
            assert!(
                matches!(&during, VaultError::Outage(outage) if outage.kind == kind),
                "{code}: {during:?}"
            );
        }
        let error = reduce(&ClientError::ResponseEmptyError);
        assert!(
            matches!(&error, VaultError::Outage(outage) if outage.kind == OutageKind::NotVault),
            "{error:?}"
        );
    }
}
