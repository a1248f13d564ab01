//! Login methods by mount: routes requests below `auth/`, except those to `auth/token/`.

use std::collections::BTreeMap;

use super::answer::{Answer, Outcome, Refusal};
use super::approle::Approle;
use super::certs::Certs;
use super::core::below_mount;
use super::ids::Ids;
use super::kubernetes::{Kubernetes, Reviews};
use super::request::{Operation, Request};
use super::tokens::Tokens;

/// The mounts, and the reviewer of all Kubernetes mounts.
#[derive(Default)]
pub(super) struct Auth {
    pub(super) mounts: BTreeMap<String, Method>,
    pub(super) reviews: Reviews,
}

/// One mount.
pub(super) enum Method {
    Approle(Approle),
    Cert(Certs),
    Kubernetes(Kubernetes),
}

impl Method {
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Approle(_) => "approle",
            Self::Cert(_) => "cert",
            Self::Kubernetes(_) => "kubernetes",
        }
    }
}

impl Auth {
    /// Answers a login, the only request below a mount that needs no token; `None` if the request is not a login.
    pub(super) fn login(
        &mut self,
        request: &Request,
        tokens: &mut Tokens,
        ids: &mut Ids,
    ) -> Option<Outcome> {
        if request.operation != Operation::Write {
            return None;
        }
        let mount = request.path.strip_prefix("auth/")?.strip_suffix("/login")?;
        Some(match self.mounts.get_mut(mount)? {
            Method::Approle(approle) => approle.login(request, tokens, ids),
            Method::Cert(certs) => certs.login(request, tokens, ids),
            Method::Kubernetes(kubernetes) => kubernetes.login(request, &self.reviews, tokens, ids),
        })
    }

    /// Answers any other request below a mount; `path` is relative to `auth/`. `None` if there is no such mount.
    pub(super) fn handle(
        &mut self,
        path: &str,
        request: &Request,
        ids: &mut Ids,
    ) -> Option<Outcome> {
        let (method, rest) = below_mount(path, &mut self.mounts)?;
        Some(match method {
            Method::Approle(approle) => approle.handle(rest, request, ids),
            Method::Cert(certs) => certs.handle(rest, request, ids),
            Method::Kubernetes(kubernetes) => kubernetes.handle(rest, request, ids),
        })
    }

    /// Rejects a renewal that the login method does not allow: certificate logins require the same certificate again.
    pub(super) fn check_renewal(
        &self,
        token: &str,
        request: &Request,
        tokens: &Tokens,
    ) -> Result<(), Refusal> {
        let Some(login) = tokens.certificate_login(token) else {
            return Ok(());
        };
        match self.mounts.get(login.mount) {
            Some(Method::Cert(certs)) => certs.check_renewal(&login, request),
            _ => Ok(()),
        }
    }

    /// Answers `sys/auth/<name>`: mounts a method.
    pub(super) fn mount(&mut self, name: &str, request: &Request) -> Outcome {
        let method = match request.body.text("type") {
            Some("approle") => Method::Approle(Approle::new(name, request.now)),
            Some("cert") => Method::Cert(Certs::new(name)),
            Some("kubernetes") => Method::Kubernetes(Kubernetes::new(name)),
            _ => {
                return Err(Refusal::bad_request(
                    "simulator: only approle, cert and kubernetes are simulated",
                ));
            }
        };
        if self.mounts.contains_key(name) {
            return Err(Refusal::bad_request(format!(
                "path is already in use at {name}/"
            )));
        }
        self.mounts.insert(name.to_owned(), method);
        Ok(Answer::Empty)
    }
}
