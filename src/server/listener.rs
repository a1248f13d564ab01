//! The bots' listener: TLS 1.3 with client certificates, always.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use rustls::{RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use super::StartError;
use crate::api::caller::{BotVerifier, bot_of};
use crate::ids::BotId;
use crate::telemetry::Metrics;

/// How long a client may take for its TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// TLS 1.3 for bots whose certificates come from `client_ca`.
pub(super) fn tls(
    certificate: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    client_ca: Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
    metrics: &Arc<Metrics>,
) -> Result<TlsAcceptor, StartError> {
    let failed = |error: rustls::Error| StartError::Tls(Box::new(error));
    let chain =
        WebPkiClientVerifier::builder_with_provider(client_ca, Arc::clone(provider)).build();
    let chain = chain.map_err(|error| StartError::Tls(Box::new(error)))?;
    let verifier = Arc::new(BotVerifier::new(chain, Arc::clone(metrics)));
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider));
    let builder = builder.with_protocol_versions(&[&TLS13]).map_err(failed)?;
    let builder = builder.with_client_cert_verifier(verifier);
    let mut config = builder.with_single_cert(certificate, key).map_err(failed)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would skip the look at the client's certificate.
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Makes TLS connections of TCP connections until told to stop.
pub(super) fn accept(
    listener: TcpListener,
    tls: TlsAcceptor,
    mut stopping: watch::Receiver<bool>,
) -> ReceiverStream<io::Result<BotStream>> {
    let (accepted, incoming) = mpsc::channel(16);
    tokio::spawn(async move {
        loop {
            let connection = tokio::select! {
                connection = listener.accept() => connection,
                _ = stopping.wait_for(|stop| *stop) => return,
            };
            let Ok((stream, peer)) = connection else {
                // Out of descriptors: let some connections end first.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let (tls, accepted) = (tls.clone(), accepted.clone());
            tokio::spawn(async move {
                match timeout(HANDSHAKE_TIMEOUT, BotStream::accept(&tls, stream)).await {
                    Ok(Ok(stream)) => _ = accepted.send(Ok(stream)).await,
                    Ok(Err(error)) => tracing::info!(%peer, %error, "TLS handshake failed"),
                    Err(_) => tracing::info!(%peer, "TLS handshake took too long"),
                }
            });
        }
    });
    ReceiverStream::new(incoming)
}

/// A connection of one bot.
pub(super) struct BotStream {
    stream: TlsStream<TcpStream>,
    bot: BotId,
}

impl BotStream {
    async fn accept(tls: &TlsAcceptor, stream: TcpStream) -> io::Result<Self> {
        // Small answers must not wait for acknowledgements: 40 ms each without this.
        stream.set_nodelay(true)?;
        let stream = tls.accept(stream).await?;
        let certificate = stream
            .get_ref()
            .1
            .peer_certificates()
            .and_then(<[_]>::first);
        let certificate = certificate.ok_or_else(|| io::Error::other("no client certificate"))?;
        let bot = bot_of(certificate).map_err(io::Error::other)?;
        Ok(Self { stream, bot })
    }
}

impl Connected for BotStream {
    type ConnectInfo = BotId;

    fn connect_info(&self) -> BotId {
        self.bot.clone()
    }
}

impl AsyncRead for BotStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for BotStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
