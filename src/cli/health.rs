//! `credbroker health`: asks a running broker how it is, for probes in images without curl.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::text::clean_lines;
use super::{CONFIG, DONE, FAILED, USAGE, read_config, say, say_problems, show};

/// For everything together, name resolution included: a probe that waits longer is killed and says nothing.
const LIMIT: Duration = Duration::from_secs(2);

/// What an answer may have; a few lines for each of a few hundred keys.
const MAX_ANSWER_BYTES: u64 = 1024 * 1024;

#[derive(Args, Debug)]
pub(super) struct Options {
    /// The configuration file, whose `listen.ops` is asked.
    #[arg(long, default_value = CONFIG)]
    config: PathBuf,
    /// The address to ask, without a configuration.
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "config")]
    address: Option<String>,
    /// Asks whether it can do its work (/readyz), and not only whether it runs (/healthz).
    #[arg(long)]
    ready: bool,
}

pub(super) fn run(probe: &Options) -> u8 {
    let address = match &probe.address {
        Some(address) => address.clone(),
        None => match ops_address(&probe.config) {
            Ok(address) => address.to_string(),
            Err(code) => return code,
        },
    };
    let port = address
        .rsplit_once(':')
        .and_then(|(_, port)| port.parse::<u16>().ok());
    if port.is_none_or(|port| port == 0) {
        say(&format!(
            "expected an address with a port, got {address}\n\
             fix: name the port where the broker listens (its log says it at the start): --address HOST:PORT"
        ));
        return USAGE;
    }
    let path = if probe.ready { "/readyz" } else { "/healthz" };
    match ask(&address, path) {
        Ok((200, text)) => show(&clean_lines(&text), DONE),
        Ok((status, text)) => {
            say(&format!("http://{address}{path} answered {status}"));
            show(&clean_lines(&text), FAILED)
        }
        Err(error) => {
            say(&format!("http://{address}{path}: {error}"));
            FAILED
        }
    }
}

fn ops_address(config: &Path) -> Result<SocketAddr, u8> {
    match read_config(config) {
        Ok(config) => Ok(from_here(config.ops)),
        Err(problems) => {
            say_problems(&problems, "credbroker check-config");
            Err(USAGE)
        }
    }
}

/// Where a listener is reached from the same machine: one on every address, on loopback.
pub(super) fn from_here(listener: SocketAddr) -> SocketAddr {
    let ip = match listener.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listener.port())
}

/// Status and body of the answer. In a thread of its own, because nothing limits a look-up of a name.
pub(super) fn ask(address: &str, path: &'static str) -> io::Result<(u16, String)> {
    let (sender, receiver) = mpsc::channel();
    let address = address.to_owned();
    thread::spawn(move || {
        // Whoever waits may have stopped waiting.
        let _ = sender.send(exchange(&address, path));
    });
    let late = |_| {
        let limit = format!("no complete answer within {} s", LIMIT.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, limit)
    };
    receiver.recv_timeout(LIMIT).map_err(late)?
}

fn exchange(address: &str, path: &str) -> io::Result<(u16, String)> {
    let head = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for resolved in address.to_socket_addrs()? {
        match TcpStream::connect(resolved) {
            Ok(mut stream) => {
                // In one piece: a head that trickles in is what a listener defends itself against.
                stream.write_all(head.as_bytes())?;
                let mut answer = Vec::new();
                stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer)?;
                return parse(&String::from_utf8_lossy(&answer));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn parse(answer: &str) -> io::Result<(u16, String)> {
    let parts = || {
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        Some((status, body.to_owned()))
    };
    let other = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "the server does not speak HTTP/1.1",
        )
    };
    parts().ok_or_else(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listener_on_every_address_is_asked_on_loopback() {
        let cases = [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:2", "[::1]:2"),
            ("10.0.0.7:3", "10.0.0.7:3"),
        ];
        for (listener, asked) in cases {
            let asked: SocketAddr = asked.parse().unwrap();
            assert_eq!(from_here(listener.parse().unwrap()), asked);
        }
    }

    #[test]
    fn an_answer_is_a_status_and_a_body() {
        let answer = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 10\r\n\r\nnot ready\n";
        assert_eq!(parse(answer).unwrap(), (503, "not ready\n".to_owned()));
        for bad in ["", "HTTP/1.1 200 OK\r\n", "SSH-2.0-x\r\n\r\n", "HTTP/1.1 2"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
