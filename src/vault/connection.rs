//! One hardened HTTP client, and what may be known of its errors.

use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use rustls::ClientConfig;
use serde_json::Value;
use url::Url;
use vaultrs::api::{EndpointError, EndpointMiddleware, EndpointResult};
use vaultrs::client::{VaultClient, VaultClientSettings};
use vaultrs::error::ClientError;

use super::{OutageKind, VaultError, VaultSettings};
use crate::base::text::clean;
use crate::base::trust::{ShowsCa, is_caused_by_shown_ca};

/// How often a node that has not heard of the last write yet is asked.
const TRIES_BEHIND: usize = 3;

/// Characters of Vault's words that are kept.
const MAX_TEXT: usize = 500;

/// The longest wait between two of these.
const CATCH_UP: Duration = Duration::from_millis(500);

/// A way to Vault with one TLS identity, or none.
#[derive(Clone, Debug)]
pub(super) struct VaultConnection {
    address: Url,
    http: reqwest::Client,
    /// Keeps no connection: the buffers of one that is idle hold what it carried last.
    http_for_secrets: reqwest::Client,
    namespace: Option<String>,
    timeout: Duration,
}

impl VaultConnection {
    /// Nothing is sent yet. Fails when the TLS library refuses the configuration.
    pub(super) fn new(settings: &VaultSettings, tls: ClientConfig) -> Result<Self, reqwest::Error> {
        let known: Vec<_> = settings
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
                && known.contains(&attempt.url().origin())
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

    /// A client of the library that sends `token`, or none if it is empty.
    pub(super) fn client(&self, token: &str) -> VaultClient {
        self.client_over(&self.http, token)
    }

    /// The same, for requests and answers that hold a key: its connections close after each.
    pub(super) fn client_for_secrets(&self, token: &str) -> VaultClient {
        self.client_over(&self.http_for_secrets, token)
    }

    /// Written out in full, because the builder of these settings reads the environment.
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

/// Repeats a request that is answered 412: the node has not heard of the last write yet.
pub(super) async fn caught_up<T, F>(ask: impl Fn() -> F) -> Result<T, ClientError>
where
    F: Future<Output = Result<T, ClientError>>,
{
    for _ in 1..TRIES_BEHIND {
        match ask().await {
            Err(error) if status_of(&error) == Some(412) => {
                tokio::time::sleep(CATCH_UP.mul_f64(fastrand::f64())).await;
            }
            other => return other,
        }
    }
    ask().await
}

/// Nothing, where Vault has no such path; a mount or namespace that is not there is an error.
pub(super) fn if_there<T>(found: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match found {
        Err(ClientError::APIError { code: 404, errors }) if errors.is_empty() => Ok(None),
        found => found.map(Some),
    }
}

/// Posts JSON with the token of `client` and returns the answer's `data`, if it has any.
///
/// Past the library, so that whoever owns `body` wipes it; errors are the library's own.
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
    let failed = |error: reqwest::Error| rustify::errors::ClientError::RequestError {
        source: error.without_url().into(),
        url: url.clone(),
        method: "POST".to_owned(),
    };
    let answer = request.send().await.map_err(failed)?;
    let status = answer.status();
    let text = answer.text().await.map_err(failed)?;
    if !status.is_success() {
        let code = status.as_u16();
        return Err(match serde_json::from_str::<EndpointError>(&text) {
            Ok(EndpointError { errors }) => ClientError::APIError { code, errors },
            Err(_) => rustify::errors::ClientError::ServerResponseError {
                code,
                content: Some(text),
            }
            .into(),
        });
    }
    if text.is_empty() {
        return Ok(None);
    }
    let answer: Option<EndpointResult<Value>> = serde_json::from_str(&text).ok();
    answer
        .map(|answer| answer.data)
        .ok_or(ClientError::ResponseEmptyError)
}

fn sensitive(token: &str) -> Result<HeaderValue, ClientError> {
    // Tokens are checked before a client is made, so this does not fail.
    let mut token = HeaderValue::from_str(token).map_err(|_| ClientError::ResponseEmptyError)?;
    token.set_sensitive(true);
    Ok(token)
}

/// Whether Vault may have done, or may yet do, what it was asked for; no where it certainly has not got the request,
/// or says itself that it has not.
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

/// The HTTP status in either of the two forms in which the library hides it.
pub(super) fn status_of(error: &ClientError) -> Option<u16> {
    match error {
        ClientError::APIError { code, .. }
        | ClientError::RestClientError {
            source: rustify::errors::ClientError::ServerResponseError { code, .. },
        } => Some(*code),
        _ => None,
    }
}

/// Whether a policy has forbidden it. A token that is dead, or that comes from outside its bound addresses, is refused
/// before any policy is asked, in other words.
pub(super) fn is_by_policy(error: &ClientError) -> bool {
    let ClientError::APIError { code: 403, errors } = error else {
        return false;
    };
    matches!(errors.as_slice(), [text] if text == "1 error occurred:\n\t* permission denied\n\n")
}

/// Whether Vault itself wrote this error, and not a proxy in front of it.
pub(super) fn is_vaults_own(error: &ClientError) -> bool {
    match error {
        // It holds Vault's list of texts.
        ClientError::APIError { .. } => true,
        // For a deleted version it is the envelope of an ordinary answer.
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

/// Vault's own words, on one line that fits into a log.
pub(super) fn texts_of(error: &ClientError) -> String {
    match error {
        ClientError::APIError { errors, .. } => clean(&errors.join("; "), MAX_TEXT).into_owned(),
        _ => String::new(),
    }
}

/// Reduces an error of the library to what may be known: never a body, never a token.
pub(super) fn reduce(error: &ClientError) -> VaultError {
    let texts = texts_of(error);
    match status_of(error) {
        Some(status @ (403 | 404)) if !is_vaults_own(error) => OutageKind::NotVault.outage(
            format!("Vault answered {status}, but not in its own words; is a proxy in between?"),
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
            kind.outage(format!("Vault answered {status}: {texts}"))
        }
        None if is_caused_by_shown_ca(error) => {
            OutageKind::Unreachable.outage(format!("Vault cannot be reached: {ShowsCa}"))
        }
        None => match error {
            ClientError::RestClientError {
                source: rustify::errors::ClientError::RequestError { .. },
            } => OutageKind::Unreachable.outage("Vault cannot be reached"),
            _ => OutageKind::NotVault.outage("Vault's answer is not what its API describes"),
        },
    }
}

/// Reduces the error of a login. It says nothing about the keys, whatever it is.
///
/// 403 is also what a Vault answers whose Kubernetes does not; 412 and 429 pass by themselves.
pub(super) fn reduce_login(error: &ClientError) -> VaultError {
    match (status_of(error), reduce(error)) {
        (Some(status @ 400..=499), _) if !matches!(status, 412 | 429) && is_vaults_own(error) => {
            let texts = texts_of(error);
            VaultError::LoginRefused(format!("login: Vault answered {status}: {texts}"))
        }
        (_, other) => other.during("login"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_an_outage_follows_from_the_answer() {
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
            // A login that failed for it fails for the same reason.
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
