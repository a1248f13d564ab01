//! `credbroker health`: checks the health of a running broker, for probes in images without curl.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::text::clean_lines;
use super::{CONFIG, DONE, FAILED, USAGE, read_config, say, say_problems, show};

/// Limit for the whole request, name resolution included: a probe that waits longer is killed without output.
const LIMIT: Duration = Duration::from_secs(2);

/// Limit of a response: enough for a few lines for each of a few hundred keys.
const MAX_RESPONSE_BYTES: u64 = 1024 * 1024;

#[derive(Args, Debug)]
pub(super) struct Options {
    /// Configuration file, whose `listen.ops` is queried.
    #[arg(long, default_value = CONFIG)]
    config: PathBuf,
    /// Address to query, instead of the one in the configuration.
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "config")]
    address: Option<String>,
    /// Check whether the broker is ready (/readyz), and not only whether it is running (/healthz).
    #[arg(long)]
    ready: bool,
}

pub(super) fn run(options: &Options) -> u8 {
    let address = match &options.address {
        Some(address) => address.clone(),
        None => match ops_address(&options.config) {
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
             fix: pass the address as --address HOST:PORT; it is the field `ops` of the broker's log line \"listening\""
        ));
        return USAGE;
    }
    let path = if options.ready { "/readyz" } else { "/healthz" };
    match ask(&address, path) {
        Ok((200, text)) => show(&clean_lines(&text), DONE),
        Ok((status, text)) => {
            say(&format!(
                "http://{address}{path} returned HTTP status {status}"
            ));
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
            say_problems(&problems, "run `credbroker check-config` to check");
            Err(USAGE)
        }
    }
}

/// The address to reach a listener from this machine: loopback if it listens on all addresses.
pub(super) fn from_here(listener: SocketAddr) -> SocketAddr {
    let ip = match listener.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listener.port())
}

/// Sends a request. Returns status and body of the response. Uses its own thread, because name lookups have no time limit.
pub(super) fn ask(address: &str, path: &'static str) -> io::Result<(u16, String)> {
    let (sender, receiver) = mpsc::channel();
    let address = address.to_owned();
    thread::spawn(move || {
        // The receiver may have given up.
        let _ = sender.send(exchange(&address, path));
    });
    let late = |_| {
        let problem = format!("no complete response within {} s", LIMIT.as_secs());
        io::Error::new(io::ErrorKind::TimedOut, problem)
    };
    receiver.recv_timeout(LIMIT).map_err(late)?
}

fn exchange(address: &str, path: &str) -> io::Result<(u16, String)> {
    let head = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
    for resolved in address.to_socket_addrs()? {
        match TcpStream::connect(resolved) {
            Ok(mut stream) => {
                // In one write: a listener may drop a client whose request head arrives slowly.
                stream.write_all(head.as_bytes())?;
                let mut response = Vec::new();
                stream.take(MAX_RESPONSE_BYTES).read_to_end(&mut response)?;
                return parse(&String::from_utf8_lossy(&response));
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn parse(response: &str) -> io::Result<(u16, String)> {
    let parts = || {
        let (head, body) = response.split_once("\r\n\r\n")?;
        let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        Some((status, body.to_owned()))
    };
    let invalid = || io::Error::new(io::ErrorKind::InvalidData, "the response is not HTTP/1.1");
    parts().ok_or_else(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listener_on_all_addresses_is_queried_on_loopback() {
        let cases = [
            ("0.0.0.0:1", "127.0.0.1:1"),
            ("[::]:2", "[::1]:2"),
            ("10.0.0.7:3", "10.0.0.7:3"),
        ];
        for (listener, queried) in cases {
            let queried: SocketAddr = queried.parse().unwrap();
            assert_eq!(from_here(listener.parse().unwrap()), queried);
        }
    }

    #[test]
    fn response_is_parsed_into_status_and_body() {
        let response = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 10\r\n\r\nnot ready\n";
        assert_eq!(parse(response).unwrap(), (503, "not ready\n".to_owned()));
        for bad in ["", "HTTP/1.1 200 OK\r\n", "SSH-2.0-x\r\n\r\n", "HTTP/1.1 2"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
