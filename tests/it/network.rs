//! Hosts in network namespaces of their own: a bot, the broker's host, a gateway and the exchange. Nothing leaves them.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use credbroker_sim::installation::MAIN_UID;
use credbroker_sim::kucoin::{KucoinSettings, KucoinSim, Limits, SimKey};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// The address on the whitelists of the keys.
pub(crate) const EGRESS: &str = "203.0.113.7";
/// The exchange's addresses: public ones, since the firewall takes no others. Nothing leaves the namespaces.
pub(crate) const SPOT: &str = "104.18.0.10";
pub(crate) const FUTURES: &str = "104.18.0.11";
/// Where the simulated exchange listens, on loopback: packets to port 443 are translated to it.
pub(crate) const SPOT_PORT: u16 = 8300;
pub(crate) const FUTURES_PORT: u16 = 8301;
/// The address of [`server_over_ipv6`].
pub(crate) const SERVER_OVER_IPV6: &str = "[fd00:30::1]:9000";

/// The broker's address and port for bots.
pub(crate) const GRPC: &str = "10.20.0.1:8443";
/// Where the egress address is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Layout {
    /// On the broker's host.
    Host,
    /// On a gateway, which translates.
    Gateway,
}

impl Layout {
    /// The source address of what the broker sends.
    pub(crate) fn source(self) -> &'static str {
        match self {
            Self::Host => EGRESS,
            Self::Gateway => "10.40.0.2",
        }
    }
}

/// Four hosts with a network of their own each: bot, broker's host, gateway and exchange.
pub(crate) struct Network(pub(crate) String);

impl Network {
    pub(crate) fn new(layout: Layout) -> Result<Self, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let network = Self(format!("cb{}-{number}", std::process::id()));
        for host in ["bot", "host", "gateway", "exchange"] {
            let name = network.name(host);
            let made = Command::new("ip").args(["netns", "add", &name]).output();
            let made = made.map_err(|error| format!("ip netns add: {error}"))?;
            if !made.status.success() {
                return Err(String::from_utf8_lossy(&made.stderr).trim().to_owned());
            }
            network.run(host, "ip link set lo up");
        }
        for (link, [left, right], [left_address, right_address]) in [
            ("bots", ["bot", "host"], ["10.20.0.2/24", "10.20.0.1/24"]),
            (
                "updates",
                ["host", "gateway"],
                ["10.30.0.2/24", "10.30.0.1/24"],
            ),
            ("wan", ["host", "gateway"], ["10.40.0.2/24", "10.40.0.1/24"]),
            (
                "uplink",
                ["gateway", "exchange"],
                ["104.18.0.1/24", "104.18.0.10/24"],
            ),
        ] {
            let peer = network.name(right);
            network.run(
                left,
                &format!("ip link add {link} type veth peer name {link} netns {peer}"),
            );
            for (host, address) in [(left, left_address), (right, right_address)] {
                network.run(host, &format!("ip address add {address} dev {link}"));
                network.run(host, &format!("ip link set {link} up"));
            }
        }
        for (host, command) in [
            ("bot", "ip route add default via 10.20.0.1"),
            ("host", "ip route add default via 10.30.0.1"),
            ("exchange", "ip address add 104.18.0.11/24 dev uplink"),
            ("exchange", "ip route add default via 104.18.0.1"),
            // The worst case: the broker's host routes the bots' packets, and answers find their way back.
            ("host", "sysctl -qw net.ipv4.ip_forward=1"),
            ("gateway", "sysctl -qw net.ipv4.ip_forward=1"),
            ("gateway", "ip route add 10.20.0.0/24 via 10.30.0.2"),
            (
                "exchange",
                "sysctl -qw net.ipv4.conf.uplink.route_localnet=1",
            ),
            ("host", "ip address add fd00:30::2/64 dev updates nodad"),
            ("gateway", "ip address add fd00:30::1/64 dev updates nodad"),
        ] {
            network.run(host, command);
        }
        match layout {
            Layout::Host => {
                network.run("host", &format!("ip address add {EGRESS}/32 dev wan"));
                network.run(
                    "gateway",
                    &format!("ip route add {EGRESS}/32 via 10.40.0.2"),
                );
            }
            Layout::Gateway => {
                let rules = include_str!("../../deploy/nftables/gateway.nft");
                network.rules(
                    "gateway",
                    &format!(
                        "define EGRESS = {EGRESS}\ndefine HOST = 10.40.0.2\ndefine OTHERS = 104.18.0.1\ndefine UPLINK = \"uplink\"\n{rules}"
                    ),
                );
                network.run("gateway", &format!("ip address add {EGRESS}/32 dev uplink"));
            }
        }
        // Translates to the simulated exchange, which listens on loopback only, and counts what arrives.
        network.rules(
            "exchange",
            &format!(
                "table inet seen {{
                    counter from_egress {{ }}
                    counter from_others {{ }}
                    counter other_kinds {{ }}
                    chain arriving {{
                        type filter hook prerouting priority raw; policy accept;
                        iifname != \"uplink\" return
                        meta l4proto ipv6-icmp return
                        ip saddr {EGRESS} tcp dport 443 counter name from_egress return
                        ip protocol tcp counter name from_others return
                        meta protocol ip counter name other_kinds
                        meta protocol ip6 counter name other_kinds
                    }}
                    chain translate {{
                        type nat hook prerouting priority dstnat; policy accept;
                        ip daddr {SPOT} tcp dport 443 dnat ip to 127.0.0.1:{SPOT_PORT}
                        ip daddr {FUTURES} tcp dport 443 dnat ip to 127.0.0.1:{FUTURES_PORT}
                    }}
                }}"
            ),
        );
        Ok(network)
    }

    pub(crate) fn name(&self, host: &str) -> String {
        format!("{}-{host}", self.0)
    }

    /// A command on one of the hosts.
    pub(crate) fn command(&self, host: &str, words: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command
            .args(["netns", "exec", &self.name(host)])
            .args(words);
        command
    }

    pub(crate) fn run(&self, host: &str, words: &str) -> String {
        let words: Vec<_> = words.split(' ').collect();
        let output = self.command(host, &words).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{host}: {words:?}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn rules(&self, host: &str, rules: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), rules).unwrap();
        self.run(host, &format!("nft -f {}", file.path().display()));
    }

    /// Runs `work` in a thread of its own, whose sockets and children belong to this host.
    pub(crate) fn thread<T: Send + 'static>(
        &self,
        host: &str,
        work: impl AsyncFnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let file = File::open(format!("/run/netns/{}", self.name(host))).unwrap();
        std::thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            // Simulators go on while `work` waits for a command.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build();
            runtime.unwrap().block_on(work())
        })
    }

    /// Tries to connect to `address`, from `source` or the default one. Returns whether that worked.
    pub(crate) fn connects(
        &self,
        host: &str,
        user: u32,
        source: Option<&str>,
        address: &str,
    ) -> bool {
        let user = user.to_string();
        let url = format!("http://{address}/api/v1/timestamp");
        let mut words = vec![
            "setpriv",
            "--reuid",
            &user,
            "--regid",
            &user,
            "--clear-groups",
        ];
        words.extend(["curl", "-s", "-o", "/dev/null", "--max-time", "3"]);
        words.extend(
            source
                .into_iter()
                .flat_map(|source| ["--interface", source]),
        );
        words.push(&url);
        let status = self.command(host, &words).status().unwrap();
        status.success()
    }

    /// Packets that have arrived at the exchange: to its port from the egress address, by TCP from others, and of other kinds.
    pub(crate) fn arrived(&self) -> [u64; 3] {
        let listed = self.run("exchange", "nft -j list counters table inet seen");
        let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
        ["from_egress", "from_others", "other_kinds"].map(|name| {
            let all = listed["nftables"].as_array().unwrap();
            let counters = all.iter().map(|item| &item["counter"]);
            let mut counters = counters.filter(|counter| counter["name"] == name);
            counters.next().unwrap()["packets"].as_u64().unwrap()
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in ["bot", "host", "gateway", "exchange"] {
            let name = self.name(host);
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

/// Why this machine cannot run the tests; `None` if it can.
pub(crate) fn missing() -> Option<String> {
    for words in [
        &["nft", "--version"][..],
        &["setpriv", "--version"],
        &["curl", "--version"],
    ] {
        if Command::new(words[0]).args(&words[1..]).output().is_err() {
            return Some(format!("there is no command {}", words[0]));
        }
    }
    None
}

/// A server on the gateway that answers every HTTP request, over IPv6; until the sender is dropped.
pub(crate) fn server_over_ipv6(network: &Network) -> oneshot::Sender<()> {
    let (stop, stopped) = oneshot::channel::<()>();
    network.thread("gateway", async move || {
        let socket = TcpListener::bind(SERVER_OVER_IPV6).await.unwrap();
        let serve = async {
            loop {
                let (mut stream, _) = socket.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await;
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                let _ = stream.write_all(answer).await;
            }
        };
        tokio::select! {
            () = serve => {}
            _ = stopped => {}
        }
    });
    stop
}

/// The key of account `main`, restricted to the egress address.
pub(crate) fn key() -> SimKey {
    SimKey {
        ip_whitelist: vec![EGRESS.parse().unwrap()],
        ..SimKey::fake(MAIN_UID)
    }
}

/// The simulated exchange, until this is dropped.
pub(crate) struct Exchange {
    pub(crate) sim: Arc<KucoinSim>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Exchange {
    pub(crate) fn start(network: &Network) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (started, is_started) = mpsc::channel();
        let thread = network.thread("exchange", async move || {
            let loopback = |port| ([127, 0, 0, 1], port).into();
            let sim = KucoinSim::start(KucoinSettings {
                spot: loopback(SPOT_PORT),
                futures: loopback(FUTURES_PORT),
                limits: Limits::none(),
                ..KucoinSettings::default()
            });
            let sim = sim.await.unwrap();
            sim.add_key(key());
            let sim = Arc::new(sim);
            let _ = started.send(Arc::clone(&sim));
            let _ = stopped.await;
        });
        Self {
            sim: is_started.recv().unwrap(),
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
