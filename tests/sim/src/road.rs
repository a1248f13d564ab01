//! A way to a server that can be closed, or swallow everything.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A way to a server.
#[derive(Debug)]
pub struct Road {
    /// Where it begins.
    pub address: SocketAddr,
    state: watch::Sender<Way>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Closed,
    Held,
    Open,
    Silent,
}

impl Road {
    /// An open one to `target`, an address such as `http://127.0.0.1:1234`.
    pub async fn to(target: &str) -> io::Result<Self> {
        Self::from("127.0.0.1:0", target).await
    }

    /// The same, listening on `address`.
    pub async fn from(address: &str, target: &str) -> io::Result<Self> {
        let target = target.rsplit('/').next().unwrap_or_default();
        let target: SocketAddr = target.parse().map_err(io::Error::other)?;
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (state, mut way) = watch::channel(Way::Open);
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    // The listener goes with this task: nobody answers any more.
                    _ = way.wait_for(|way| *way == Way::Closed) => return,
                };
                let Ok((mut from, _)) = accepted else {
                    return;
                };
                let mut way = way.clone();
                tokio::spawn(async move {
                    let at_first = *way.borrow_and_update();
                    match at_first {
                        Way::Silent => {
                            let _ = way.changed().await;
                            return;
                        }
                        Way::Held => {
                            let _ = way.changed().await;
                        }
                        Way::Closed | Way::Open => {}
                    }
                    let Ok(mut to) = TcpStream::connect(target).await else {
                        return;
                    };
                    let _ = (from.set_nodelay(true), to.set_nodelay(true));
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
                        // What is on its way is cut.
                        _ = way.changed() => {}
                    }
                });
            }
        });
        Ok(Self { address, state })
    }

    /// Refuses connections from now on, and cuts those that are open.
    pub fn close(&self) {
        self.state.send_replace(Way::Closed);
    }

    /// Takes connections and says nothing until it is opened; cuts those that are open.
    pub fn hold(&self) {
        self.state.send_replace(Way::Held);
    }

    /// Lets everything through.
    pub fn open(&self) {
        self.state.send_replace(Way::Open);
    }

    /// Takes connections and says nothing; cuts those that are open.
    pub fn silence(&self) {
        self.state.send_replace(Way::Silent);
    }
}
