//! A TCP proxy in front of a server that can refuse connections, leave them unanswered or hold up their bytes.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A TCP proxy in front of a server.
#[derive(Debug)]
pub struct Proxy {
    /// The address that it listens on.
    pub address: SocketAddr,
    state: watch::Sender<State>,
    is_paused: watch::Sender<bool>,
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
        let is_paused = watch::Sender::new(false);
        let pauses = is_paused.subscribe();
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
                let (mut state_changes, pauses) = (state_changes.clone(), pauses.clone());
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
                    let ((from_read, from_write), (to_read, to_write)) = (from.split(), to.split());
                    let there = forward(from_read, to_write, pauses.clone());
                    let back = forward(to_read, from_write, pauses);
                    tokio::select! {
                        _ = async { tokio::try_join!(there, back) } => {}
                        // Open connections are cut.
                        _ = state_changes.changed() => {}
                    }
                });
            }
        });
        Ok(Self {
            address,
            state,
            is_paused,
        })
    }

    /// Holds up the bytes of all open connections, or forwards them again; cuts nothing.
    pub fn pause(&self, is_paused: bool) {
        self.is_paused.send_replace(is_paused);
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

/// Copies bytes until the sender closes its side, and not while the proxy is paused.
async fn forward(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut is_paused: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let bytes = from.read(&mut buffer).await?;
        // Fails if the proxy is dropped, which cuts the connection.
        let _ = is_paused.wait_for(|is_paused| !is_paused).await;
        if bytes == 0 {
            return to.shutdown().await;
        }
        to.write_all(buffer.get(..bytes).unwrap_or_default())
            .await?;
    }
}
