//! A TCP proxy in front of a server that can refuse connections or leave them unanswered.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A TCP proxy in front of a server.
#[derive(Debug)]
pub struct Proxy {
    /// The address that it listens on.
    pub address: SocketAddr,
    state: watch::Sender<State>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Closed,
    Held,
    Open,
    Silent,
}

impl Proxy {
    /// An open proxy to `target`, a URL such as `http://127.0.0.1:1234`, on a free port.
    pub async fn to(target: &str) -> io::Result<Self> {
        Self::from("127.0.0.1:0", target).await
    }

    /// The same, but listening on `address`.
    pub async fn from(address: &str, target: &str) -> io::Result<Self> {
        let target = target.rsplit('/').next().unwrap_or_default();
        let target: SocketAddr = target.parse().map_err(io::Error::other)?;
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (state, mut state_changes) = watch::channel(State::Open);
        tokio::spawn(async move {
            loop {
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    // This task owns the listener: from now on connections are refused.
                    _ = state_changes.wait_for(|state| *state == State::Closed) => return,
                };
                let Ok((mut from, _)) = accepted else {
                    return;
                };
                let mut state_changes = state_changes.clone();
                tokio::spawn(async move {
                    let state = *state_changes.borrow_and_update();
                    match state {
                        State::Silent => {
                            let _ = state_changes.changed().await;
                            return;
                        }
                        State::Held => {
                            let _ = state_changes.changed().await;
                        }
                        State::Closed | State::Open => {}
                    }
                    let Ok(mut to) = TcpStream::connect(target).await else {
                        return;
                    };
                    let _ = (from.set_nodelay(true), to.set_nodelay(true));
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut from, &mut to) => {}
                        // Open connections are cut.
                        _ = state_changes.changed() => {}
                    }
                });
            }
        });
        Ok(Self { address, state })
    }

    /// Cuts open connections and refuses new ones from now on; cannot be undone.
    pub fn close(&self) {
        self.state.send_replace(State::Closed);
    }

    /// Cuts open connections; accepts new ones and forwards nothing until the state changes, then forwards them.
    pub fn hold(&self) {
        self.state.send_replace(State::Held);
    }

    /// Forwards new connections and those that were held; cuts all others.
    pub fn open(&self) {
        self.state.send_replace(State::Open);
    }

    /// Cuts open connections; accepts new ones and never answers them.
    pub fn silence(&self) {
        self.state.send_replace(State::Silent);
    }
}
