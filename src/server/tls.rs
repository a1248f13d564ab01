//! What the bots' listener trusts and shows: replaced as a whole when its files change.

use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use tokio_rustls::TlsAcceptor;

use super::StartError;
use crate::api::caller::BotVerifier;
use crate::config::load::Certificates;
use crate::telemetry::Metrics;

/// TLS 1.3 for bots whose certificates come from the client CA.
pub(super) struct Tls {
    /// Shakes hands.
    pub(super) acceptor: TlsAcceptor,
    /// Looks at certificates, also at those of connections that are already open.
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    /// Another one for other CAs.
    pub(super) generation: u64,
}

impl Tls {
    pub(super) fn new(
        certificates: Certificates,
        generation: u64,
        provider: &Arc<CryptoProvider>,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let Certificates {
            chain,
            key,
            client_ca,
            ..
        } = certificates;
        let failed = |error: rustls::Error| StartError::Tls(Box::new(error));
        let trusted =
            WebPkiClientVerifier::builder_with_provider(client_ca, Arc::clone(provider)).build();
        let trusted = trusted.map_err(|error| StartError::Tls(Box::new(error)))?;
        let verifier: Arc<dyn ClientCertVerifier> =
            Arc::new(BotVerifier::new(trusted, Arc::clone(metrics)));
        let builder = ServerConfig::builder_with_provider(Arc::clone(provider));
        let builder = builder.with_protocol_versions(&[&TLS13]).map_err(failed)?;
        let builder = builder.with_client_cert_verifier(Arc::clone(&verifier));
        let mut config = builder.with_single_cert(chain, key).map_err(failed)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would skip the look at the client's certificate.
        config.send_tls13_tickets = 0;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            verifier,
            generation,
        })
    }
}
