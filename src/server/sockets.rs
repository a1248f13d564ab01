//! The listening sockets: opened here, or inherited from the process that starts the broker.
//!
//! If a supervisor keeps the sockets open, connections that arrive while the broker restarts wait in them. The protocol is
//! that of `sd_listen_fds(3)`: `LISTEN_FDS`, `LISTEN_PID` and `LISTEN_FDNAMES`, with descriptors from 3. Not `SO_REUSEPORT`:
//! closing one of several such sockets resets the connections that wait in it.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};

use listenfd::ListenFd;
use tokio::net::TcpListener;

use super::StartError;
use crate::config::Config;

/// The names of the sockets, as in `[listen]`; also their order if they are passed without these names.
const NAMES: [&str; 3] = ["grpc", "ops", "admin"];

/// Connections that may wait to be accepted, in a burst or during a restart. The system allows `net.core.somaxconn` of them
/// at most.
const BACKLOG: i32 = 65_535;

/// The sockets that this process has inherited, by name.
#[derive(Debug, Default)]
pub(crate) struct Inherited(BTreeMap<&'static str, StdListener>);

/// The open sockets, each with its address.
pub(super) struct Sockets {
    pub(super) grpc: (TcpListener, SocketAddr),
    pub(super) ops: (TcpListener, SocketAddr),
    pub(super) admin: Option<(TcpListener, SocketAddr)>,
    /// The names of the inherited ones; `None` if there are none.
    pub(super) inherited: Option<String>,
}

impl Inherited {
    /// Takes the sockets that `LISTEN_FDS` announces to this process, once: later calls, and programs that this one starts,
    /// find none. Changes the environment, so no other thread may run.
    ///
    /// # Errors
    /// When one is not a TCP socket, or its name is unknown.
    pub(crate) fn take() -> Result<Self, StartError> {
        let names = std::env::var_os("LISTEN_FDNAMES").unwrap_or_default();
        let mut passed = ListenFd::from_env();
        let names = names_of(passed.len(), &names.to_string_lossy());
        let names = names.map_err(StartError::Inherited)?;
        let mut sockets = BTreeMap::new();
        for (index, name) in names.into_iter().enumerate() {
            let socket = passed.take_tcp_listener(index);
            let socket =
                socket.map_err(|error| StartError::Inherited(format!("socket {name}: {error}")))?;
            // `None` only for an index that was taken before.
            sockets.extend(socket.map(|socket| (name, socket)));
        }
        Ok(Self(sockets))
    }

    /// Opens the sockets of `[listen]` that were not inherited.
    ///
    /// # Errors
    /// When one cannot be opened, or an inherited one does not belong to its address in `[listen]`.
    pub(super) async fn open(mut self, config: &Config) -> Result<Sockets, StartError> {
        let inherited: Vec<_> = self.0.keys().copied().collect();
        let sockets = Sockets {
            grpc: self.listen("grpc", config.grpc).await?,
            ops: self.listen("ops", config.ops).await?,
            admin: match config.admin {
                Some(address) => Some(self.listen("admin", address).await?),
                None => None,
            },
            inherited: (!inherited.is_empty()).then(|| inherited.join(",")),
        };
        match self.0.into_keys().next() {
            Some(name) => Err(StartError::Inherited(format!(
                "a socket {name} was passed, but listen.{name} is not set; set it, or do not pass this socket"
            ))),
            None => Ok(sockets),
        }
    }

    async fn listen(
        &mut self,
        name: &'static str,
        address: SocketAddr,
    ) -> Result<(TcpListener, SocketAddr), StartError> {
        let open = async {
            let listener = match self.0.remove(name) {
                Some(inherited) => {
                    inherited.set_nonblocking(true)?;
                    TcpListener::from_std(inherited)?
                }
                None => TcpListener::bind(address).await?,
            };
            // Also sets the backlog of a socket that listens already.
            rustix::net::listen(&listener, BACKLOG)?;
            let bound = listener.local_addr()?;
            io::Result::Ok((listener, bound))
        };
        let (listener, bound) = open
            .await
            .map_err(|error| StartError::Listen(address, error))?;
        let is_right = bound.ip() == address.ip() && [0, bound.port()].contains(&address.port());
        if !is_right {
            return Err(StartError::Inherited(format!(
                "socket {name} is bound to {bound}, but listen.{name} is {address}; set both to the same address"
            )));
        }
        Ok((listener, bound))
    }
}

/// The name of each of `count` sockets. `names` is the value of `LISTEN_FDNAMES`: one name for each, separated by colons.
/// Sockets without one of [`NAMES`] are in the order of [`NAMES`]: systemd names all sockets of a unit after the unit.
fn names_of(count: usize, names: &str) -> Result<Vec<&'static str>, String> {
    if count > NAMES.len() {
        return Err(format!(
            "expected at most {} sockets, got {count}; pass one for each address of [listen]",
            NAMES.len()
        ));
    }
    if count == 0 {
        return Ok(Vec::new());
    }
    let known = |name: &str| NAMES.into_iter().find(|known| *known == name);
    if !names.split(':').any(|name| known(name).is_some()) {
        return Ok(NAMES.into_iter().take(count).collect());
    }
    let fix = "set LISTEN_FDNAMES (systemd: FileDescriptorName=) to one of grpc, ops and admin for each socket";
    let mut found = Vec::new();
    for name in names.split(':') {
        match known(name) {
            Some(name) if !found.contains(&name) => found.push(name),
            Some(name) => return Err(format!("two sockets are named {name}; {fix}")),
            None => return Err(format!("unknown name {name:?} of a socket; {fix}")),
        }
    }
    if found.len() == count {
        Ok(found)
    } else {
        Err(format!(
            "expected as many names as sockets, got {} and {count}; {fix}",
            found.len()
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_without_names_are_in_the_order_of_the_addresses() {
        for (count, names, expected) in [
            (0, "grpc:ops", Ok(vec![])),
            (2, "", Ok(vec!["grpc", "ops"])),
            (
                3,
                "credbroker.socket:credbroker.socket:credbroker.socket",
                Ok(vec!["grpc", "ops", "admin"]),
            ),
            (2, "admin:grpc", Ok(vec!["admin", "grpc"])),
            (4, "", Err("expected at most 3 sockets, got 4")),
            (2, "grpc:grpc", Err("two sockets are named grpc")),
            (2, "grpc:", Err("unknown name \"\" of a socket")),
            (
                2,
                "grpc",
                Err("expected as many names as sockets, got 1 and 2"),
            ),
        ] {
            match (names_of(count, names), expected) {
                (Err(problem), Err(start)) => assert!(problem.starts_with(start), "{problem}"),
                (found, expected) => assert_eq!(found, expected.map_err(str::to_owned)),
            }
        }
    }
}
