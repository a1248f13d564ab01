//! Puts a broker together from its configuration, and begins nothing: no listener, no poll, no question, no lock.
//!
//! For [`Server`](super::Server), and for commands that look at an installation without one.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, RootCertStore};

use super::StartError;
use crate::audit::Audit;
use crate::base::lock::RwLock;
use crate::base::toml_file::Problem;
use crate::base::trust;
use crate::broker::admission::Admission;
use crate::broker::probes::RecheckSignals;
use crate::broker::{Broker, Calls, UnknownCodes};
use crate::clock::Clock;
use crate::config::Config;
use crate::config::load::{Certificates, Loaded};
use crate::egress::Egress;
use crate::egress::proof::Proof;
use crate::keyring::Keyring;
use crate::policy::Policy;
use crate::restrictions::Restrictions;
use crate::telemetry::Metrics;
use crate::vault::Vault;

/// A broker that has not begun anything.
#[derive(Debug)]
pub(crate) struct Assembled {
    /// Sends requests once the names of hosts are resolved, by [`Egress::start`] or [`Egress::resolve`]; the places of its
    /// keys are empty.
    pub(crate) broker: Arc<Broker>,
    /// The way to Vault, not logged in.
    pub(crate) vault: Arc<Vault>,
    /// For listeners, which are not part of it.
    pub(crate) certificates: Certificates,
    /// What TLS computes with.
    pub(crate) provider: Arc<CryptoProvider>,
}

/// Puts a broker together of what the files hold. Opens the audit file, which is made where it is missing; writes nothing.
///
/// Whoever means to stay holds the lock of the state folder before, so that what is forbidden is read once nobody else
/// writes it.
///
/// # Errors
/// When the audit file or cannot load restrictions.json, or TLS cannot be set up.
pub(crate) fn assemble(
    config: &Config,
    loaded: Loaded,
    clock: Arc<Clock>,
) -> Result<Assembled, StartError> {
    let Loaded {
        policy,
        certificates,
        vault_roots,
        egress_roots,
        ..
    } = loaded;
    let provider = provider();
    let egress = egress(config, egress_roots, &provider)?;
    let broker = broker(config, policy, egress, clock)?;
    let vault = vault(config, vault_roots, &provider, &broker.metrics)?;
    Ok(Assembled {
        broker: Arc::new(broker),
        vault: Arc::new(vault),
        certificates,
        provider,
    })
}

/// The request path alone: no keys, and no way to Vault.
///
/// # Errors
/// When the audit file or cannot load restrictions.json.
pub(crate) fn broker(
    config: &Config,
    policy: Policy,
    egress: Egress,
    clock: Arc<Clock>,
) -> Result<Broker, StartError> {
    let restrictions = Restrictions::open(&config.state_dir).map_err(StartError::Restrictions)?;
    let restrictions = Arc::new(restrictions);
    let metrics = Arc::new(Metrics::default());
    let audit = Audit::open(&config.audit_file, Arc::clone(&clock), Arc::clone(&metrics));
    let unopened = |error| StartError::Audit(config.audit_file.display().to_string(), error);
    let audit = audit.map_err(unopened)?;
    let keyring = Arc::new(Keyring::new(Arc::clone(&clock), Arc::clone(&restrictions)));
    keyring.add(policy.accounts());
    Ok(Broker {
        policy: RwLock::new(Arc::new(policy)),
        audit,
        restrictions,
        keyring,
        egress,
        proof: Proof::new(config.expected_ip, config.proof),
        clock,
        rechecks: RecheckSignals::default(),
        metrics,
        admission: Admission::new(config.admission_limits),
        calls: Calls::default(),
        refusal_codes: config.refusal_codes.clone(),
        unknown_codes: UnknownCodes::default(),
    })
}

/// What TLS computes with, everywhere.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The way to the exchange.
pub(crate) fn egress(
    config: &Config,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Egress, StartError> {
    let mut tls = client_tls(roots, provider)?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (settings, origins) = (config.egress.clone(), config.origins.clone());
    Egress::new(settings, origins, &Arc::new(tls)).map_err(|origin| {
        let problem = format!("{} is neither a DNS name nor an address", origin.name);
        StartError::Config(vec![Problem::new("exchange", problem)])
    })
}

/// The way to Vault.
pub(crate) fn vault(
    config: &Config,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
    metrics: &Arc<Metrics>,
) -> Result<Vault, StartError> {
    let tls = client_tls(roots, provider)?;
    Vault::new(config.vault.clone(), tls, Arc::clone(metrics))
        .map_err(|error| StartError::Tls(Box::new(error)))
}

/// TLS towards Vault and the exchange: these roots and no others, no client certificate.
pub(crate) fn client_tls(
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<ClientConfig, StartError> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider));
    let builder = builder.with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| StartError::Tls(Box::new(error)))?;
    Ok(trust::with_roots(builder, roots, provider).with_no_client_auth())
}
