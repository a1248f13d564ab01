//! Builds a broker from its configuration without starting anything: no listener, no poll, no request, no lock.
//!
//! For [`Server`](super::Server), and for commands that check an installation without a server.

use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, RootCertStore};

use super::StartError;
use super::descriptors::Shortage;
use crate::audit::Audit;
use crate::base::lock::RwLock;
use crate::base::toml_file::Problem;
use crate::base::trust;
use crate::broker::admission::{Admission, AdmissionLimits};
use crate::broker::dead_man::DeadManSwitches;
use crate::broker::probes::RecheckSignals;
use crate::broker::resolve::LookupLimits;
use crate::broker::{Broker, Calls, UnknownCodes};
use crate::budgets::Budgets;
use crate::clock::Clock;
use crate::config::Config;
use crate::config::load::{Certificates, Loaded};
use crate::egress::Egress;
use crate::egress::proof::Proof;
use crate::keyring::Keyring;
use crate::orders::Orders;
use crate::policy::Policy;
use crate::process::{Share, hardened};
use crate::restrictions::Restrictions;
use crate::telemetry::Metrics;
use crate::vault::Vault;

/// A broker that has not been started.
#[derive(Debug)]
pub(crate) struct Assembled {
    /// Can send once host names are resolved, by [`Egress::start`] or [`Egress::resolve`]. No keys are loaded.
    pub(crate) broker: Arc<Broker>,
    /// The Vault client, not logged in.
    pub(crate) vault: Arc<Vault>,
    /// Certificates for the listeners, which are not part of this.
    pub(crate) certificates: Certificates,
    /// The cryptography that TLS uses.
    pub(crate) provider: Arc<CryptoProvider>,
}

/// Builds a broker from the loaded files. Opens the audit log, creating it if it is missing; writes nothing to it.
///
/// A server must lock the state folder first, so that no other broker writes `restrictions.json` after it was read.
///
/// # Errors
/// When the audit log or `restrictions.json` cannot be opened, or TLS cannot be set up.
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

/// Only the request path: no keys and no Vault client.
///
/// # Errors
/// When the audit log or `restrictions.json` cannot be opened.
pub(crate) fn broker(
    config: &Config,
    policy: Policy,
    egress: Egress,
    clock: Arc<Clock>,
) -> Result<Broker, StartError> {
    let restrictions = Restrictions::open(&config.state_dir).map_err(StartError::Restrictions)?;
    let restrictions = Arc::new(restrictions);
    let metrics = Arc::new(Metrics::default());
    let audit = Audit::open(
        &config.audit_file,
        config.audit_reserve_bytes,
        Arc::clone(&clock),
        Arc::clone(&metrics),
    );
    let unopened = |error| StartError::Audit(config.audit_file.display().to_string(), error);
    let audit = audit.map_err(unopened)?;
    let keyring = Arc::new(Keyring::new(Arc::clone(&clock), Arc::clone(&restrictions)));
    keyring.add(policy.accounts());
    Ok(Broker {
        orders: Orders::new(config.orders, policy.bots_count(), &config.state_dir),
        policy: RwLock::new(Arc::new(policy)),
        audit,
        restrictions,
        keyring,
        egress,
        proof: Proof::new(config.expected_ip, config.proof),
        budgets: Arc::new(Budgets::new(config.edge_limit, Arc::clone(&clock))),
        clock,
        rechecks: RecheckSignals::default(),
        metrics,
        admission: Admission::new(admission_limits(config)),
        calls: Calls::default(),
        lookups: LookupLimits::default(),
        not_found: config.not_found.clone(),
        dead_man: DeadManSwitches::default(),
        refusal_codes: config.refusal_codes.clone(),
        unknown_codes: UnknownCodes::default(),
    })
}

/// The configured limits, with as many connections as the process may have open.
fn admission_limits(config: &Config) -> AdmissionLimits {
    let limits = config.admission_limits;
    let shortage = hardened().and_then(|process| Shortage::find(&limits, process.descriptors));
    if let Some(shortage) = shortage {
        tracing::warn!(
            connections = shortage.bots.0,
            exchange_connections = shortage.exchange.0,
            needed = shortage.needed,
            "the limit of open files allows fewer connections than [limits]; set LimitNOFILE (systemd) or --ulimit nofile (containers)"
        );
    }
    AdmissionLimits {
        connections: Share::Bots.limit(limits.connections),
        ..limits
    }
}

/// The cryptography for all TLS.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The client for the exchange.
pub(crate) fn egress(
    config: &Config,
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<Egress, StartError> {
    let mut tls = client_tls(roots, provider)?;
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (settings, origins) = (config.egress.clone(), config.origins.clone());
    Egress::new(settings, origins, &Arc::new(tls)).map_err(|origin| {
        let problem = format!("{} is neither a DNS name nor an IP address", origin.name);
        StartError::Config(vec![Problem::new("exchange", problem)])
    })
}

/// The client for Vault.
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

/// Client TLS for Vault and the exchange: only these roots, no client certificate.
pub(crate) fn client_tls(
    roots: RootCertStore,
    provider: &Arc<CryptoProvider>,
) -> Result<ClientConfig, StartError> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider));
    let builder = builder.with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| StartError::Tls(Box::new(error)))?;
    Ok(trust::with_roots(builder, roots, provider).with_no_client_auth())
}
