//! TLS of a listener: its certificate and trusted CAs, replaced together when their files change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::version::TLS13;
use rustls::{RootCertStore, ServerConfig};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use super::StartError;
use crate::config::load::Certificates;
use crate::server::identity::{CallerVerifier, CertificateRole, caller_of, not_after_ms};
use crate::telemetry::Metrics;

/// TLS 1.3 for callers of one role, with certificates of certain CAs.
pub(super) struct Tls {
    /// Performs handshakes.
    pub(super) acceptor: TlsAcceptor,
    /// Verifies client certificates, also of open connections.
    verifier: Arc<dyn ClientCertVerifier>,
    /// Increases when the CAs change.
    pub(super) generation: u64,
}

impl Tls {
    /// For callers of the role `R` with certificates of the CAs in `trusted`.
    pub(super) fn new<R: CertificateRole>(
        certificates: &Certificates,
        trusted: &Arc<RootCertStore>,
        generation: u64,
        provider: &Arc<CryptoProvider>,
        metrics: &Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let failed = |error: rustls::Error| StartError::Tls(Box::new(error));
        let trusted =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(trusted), Arc::clone(provider));
        let trusted = trusted
            .build()
            .map_err(|error| StartError::Tls(Box::new(error)))?;
        let verifier: Arc<dyn ClientCertVerifier> =
            Arc::new(CallerVerifier::<R>::new(trusted, Arc::clone(metrics)));
        let builder = ServerConfig::builder_with_provider(Arc::clone(provider));
        let builder = builder.with_protocol_versions(&[&TLS13]).map_err(failed)?;
        let builder = builder.with_client_cert_verifier(Arc::clone(&verifier));
        let (chain, key) = (certificates.chain.clone(), certificates.key.clone_key());
        let mut config = builder.with_single_cert(chain, key).map_err(failed)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // A resumed session would skip the verification of the client's certificate.
        config.send_tls13_tickets = 0;
        Ok(Self {
            acceptor: TlsAcceptor::from(Arc::new(config)),
            verifier,
            generation,
        })
    }
}

/// The certificate of an open connection, verified again when the trusted CAs change.
pub(super) struct Trust {
    chain: Vec<CertificateDer<'static>>,
    not_after_ms: i64,
    tls: watch::Receiver<Arc<Tls>>,
    /// The generation of CAs with which it was verified last.
    verified: AtomicU64,
    /// Whether a later verification refused it.
    is_refused: AtomicBool,
}

impl Trust {
    /// The first certificate of a chain that was verified in a handshake with this generation of CAs; `None` if it does not
    /// parse.
    pub(super) fn new(
        chain: &[CertificateDer<'_>],
        generation: u64,
        tls: watch::Receiver<Arc<Tls>>,
    ) -> Option<Self> {
        let chain: Vec<_> = chain.iter().map(|link| link.clone().into_owned()).collect();
        Some(Self {
            not_after_ms: not_after_ms(chain.first()?)?,
            chain,
            tls,
            verified: AtomicU64::new(generation),
            is_refused: AtomicBool::new(false),
        })
    }

    /// The caller that it names.
    pub(super) fn caller<R: CertificateRole>(&self) -> Option<R> {
        caller_of(self.chain.first()?).ok()
    }

    /// Whether it is still valid and trusted; `now_ms` is Unix time in milliseconds.
    pub(super) fn holds(&self, now_ms: i64) -> bool {
        if now_ms > self.not_after_ms || self.is_refused.load(Ordering::Relaxed) {
            return false;
        }
        let tls = Arc::clone(&self.tls.borrow());
        if tls.generation == self.verified.load(Ordering::Relaxed) {
            return true;
        }
        let now = UnixTime::since_unix_epoch(Duration::from_millis(now_ms.unsigned_abs()));
        let is_verified = self.chain.split_first().is_some_and(|(first, others)| {
            tls.verifier.verify_client_cert(first, others, now).is_ok()
        });
        if is_verified {
            self.verified.store(tls.generation, Ordering::Relaxed);
        } else {
            self.is_refused.store(true, Ordering::Relaxed);
        }
        is_verified
    }

    /// Reports changes of the CAs, after which it should be verified again.
    pub(super) fn changes(&self) -> watch::Receiver<Arc<Tls>> {
        self.tls.clone()
    }
}
