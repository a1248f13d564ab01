//! TLS in front of the simulated exchange, with a certificate of the test's choice.

use std::net::SocketAddr;
use std::sync::Arc;

use credbroker_sim::pki::Identity;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

/// A listener that forwards to a target; dropping it cuts its connections and refuses new ones.
pub(crate) struct Front {
    pub(crate) address: SocketAddr,
    target: SocketAddr,
    /// `None`: stopped.
    task: Option<JoinHandle<()>>,
}

impl Front {
    /// Listens on `address`, or on a free port.
    pub(crate) async fn start(
        address: Option<SocketAddr>,
        target: SocketAddr,
        identity: &Identity,
    ) -> Self {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let listener = TcpListener::bind(address.unwrap_or(any)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let tls = TlsAcceptor::from(Arc::new(server(identity)));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                while connections.try_join_next().is_some() {}
                let Ok((stream, _)) = listener.accept().await else {
                    continue;
                };
                let tls = tls.clone();
                connections.spawn(async move {
                    let mut to = TcpStream::connect(target).await?;
                    let _ = (stream.set_nodelay(true), to.set_nodelay(true));
                    let mut from = tls.accept(stream).await?;
                    copy_bidirectional(&mut from, &mut to).await
                });
            }
        });
        Self {
            address,
            target,
            task: Some(task),
        }
    }

    /// Cuts its connections, and refuses new ones.
    pub(crate) async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }

    /// Listens again after a stop.
    pub(crate) async fn start_again(&mut self, identity: &Identity) {
        *self = Self::start(Some(self.address), self.target, identity).await;
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.task.iter().for_each(JoinHandle::abort);
    }
}

fn server(identity: &Identity) -> rustls::ServerConfig {
    let certificate = CertificateDer::from_pem_slice(identity.certificate_pem.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(identity.key_pem.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = rustls::ServerConfig::builder_with_provider(provider);
    let tls = tls.with_safe_default_protocol_versions().unwrap();
    let tls = tls.with_no_client_auth();
    tls.with_single_cert(vec![certificate], key).unwrap()
}
