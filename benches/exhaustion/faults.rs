//! The rows of the table: each uses up one resource.

use std::future::{Future, ready};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use credbroker::proto::SignAndSendRequest;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_rustls::TlsConnector;

use crate::harness::{Bot, Patient, accounts, patient, print_always, spot_order, tls};
use crate::raw_bot::{DATA, PRIORITY, RawBot, frame};
use crate::{Disk, Row, Site, get};

pub(crate) type Starting<'a> = Pin<Box<dyn Future<Output = Fault> + 'a>>;

/// The path of [`accounts`].
const ACCOUNTS: &str = "/api/v1/accounts";
/// The path of [`spot_order`].
const ORDERS: &str = "/api/v1/hf/orders";

/// A kind of HTTP/2 frames (RFC 9113, section 6.9).
const WINDOW_UPDATE: u8 = 8;

/// A setting in a SETTINGS frame: how many bytes of an answer the broker may send (RFC 9113, section 6.5.2).
const INITIAL_WINDOW_SIZE: u16 = 4;

/// How long to wait until enough has met the fault.
const MET_WITHIN: Duration = Duration::from_secs(20);

const ROW: Row = Row {
    name: "",
    how: "",
    unit: "calls",
    start: |site| Box::pin(Fault::new(site, Met::Kucoin, 0)),
    config: |config| config,
    disk: None,
    descriptors: None,
    max_ratio: 1.5,
    max_healthz: Duration::from_secs(1),
    min_block: Duration::ZERO,
    exit_code: 0,
};

/// A flood with HTTP/2 frames. The processor time of the one thread is shared fairly, so cancels may take twice as long.
const FLOOD: Row = Row {
    unit: "frames",
    max_ratio: 2.0,
    ..ROW
};

const ON_DISK: Row = Row {
    config: |config| format!("{config}\n[audit]\nfile = \"disk/audit.jsonl\"\n"),
    ..ROW
};

pub(crate) static ROWS: [Row; 20] = [
    Row {
        name: "hung-reads-1",
        how: "1 bot polls 300 reads that the exchange does not answer",
        start: |site| Box::pin(hung_reads(site, 1)),
        ..ROW
    },
    Row {
        name: "hung-reads-5",
        how: "5 bots poll 300 such reads each",
        start: |site| Box::pin(hung_reads(site, 5)),
        ..ROW
    },
    Row {
        name: "hung-orders",
        how: "8 orders of 1 bot are not answered",
        start: |site| Box::pin(hung_orders(site)),
        // They stay `maybe_sent`.
        exit_code: 1,
        ..ROW
    },
    Row {
        name: "idle-128",
        how: "2 bots keep 64 idle connections each; 128 descriptors",
        unit: "connections",
        start: |site| Box::pin(ready(idle(site, 2, 60))),
        descriptors: Some(128),
        ..ROW
    },
    Row {
        name: "idle-1024",
        how: "20 bots keep 64 idle connections each; 1,024 descriptors",
        unit: "connections",
        start: |site| Box::pin(ready(idle(site, 20, 500))),
        descriptors: Some(1024),
        ..ROW
    },
    Row {
        name: "window-0",
        how: "8 bots request 8 answers of 3 MB each and open no HTTP/2 window",
        start: |site| Box::pin(slow_readers(site, 0)),
        ..ROW
    },
    Row {
        name: "byte-by-byte",
        how: "8 bots request 8 answers of 3 MB each and read one byte at a time",
        unit: "bytes",
        start: |site| Box::pin(slow_readers(site, 1)),
        ..ROW
    },
    Row {
        name: "large-answers",
        how: "1 bot polls 60 answers of 15 MB (`max_answer_bytes` is 16 MiB)",
        start: |site| {
            Box::pin(polled_answers(
                site,
                json!({"oversized": {"megabytes": 15}}),
                60,
            ))
        },
        config: |config| config.replace("[egress]\n", "[egress]\nmax_answer_bytes = 16777216\n"),
        ..ROW
    },
    Row {
        name: "flood-priority",
        how: "8 peers send PRIORITY frames without end",
        start: |site| Box::pin(ready(flood(site, Flood::Priority))),
        ..FLOOD
    },
    Row {
        name: "flood-window-update",
        how: "8 peers send WINDOW_UPDATE frames without end",
        start: |site| Box::pin(ready(flood(site, Flood::WindowUpdate))),
        ..FLOOD
    },
    Row {
        name: "flood-unknown",
        how: "8 peers send empty frames of an unknown kind without end",
        start: |site| Box::pin(ready(flood(site, Flood::Unknown))),
        ..FLOOD
    },
    Row {
        name: "flood-empty",
        how: "8 peers send empty DATA frames without end",
        start: |site| Box::pin(ready(flood(site, Flood::EmptyData))),
        ..FLOOD
    },
    Row {
        name: "flood-103",
        how: "the exchange sends 103 without end in answer to 8 polled reads",
        unit: "calls",
        start: |site| Box::pin(polled_answers(site, json!({"early_hints": {}}), 8)),
        ..FLOOD
    },
    Row {
        name: "one-byte-chunks",
        how: "the exchange answers 8 polled reads with 1 MB in chunks of one byte",
        start: |site| {
            Box::pin(polled_answers(
                site,
                json!({"one_byte_chunks": {"kilobytes": 1000}}),
                8,
            ))
        },
        ..ROW
    },
    Row {
        name: "vault-endless",
        how: "Vault answers every poll (each second) with a text without end",
        unit: "polls",
        start: |site| Box::pin(vault_endless(site)),
        config: |config| config.replace("timeout_ms = 1000", "timeout_ms = 3000"),
        ..ROW
    },
    Row {
        name: "handshakes-silent",
        how: "600 connections to the bots' listener that send nothing",
        unit: "connections",
        start: |site| Box::pin(ready(silent(site, site.lab.grpc, 600, 300))),
        ..ROW
    },
    Row {
        name: "ops-silent",
        how: "256 connections to the ops listener that send nothing",
        unit: "connections",
        start: |site| Box::pin(ready(silent(site, site.lab.ops, 256, 128))),
        max_healthz: Duration::from_millis(200),
        ..ROW
    },
    Row {
        name: "log-unread",
        how: "nobody reads the log pipe (debug level, 4 polled reads)",
        unit: "bytes",
        start: |site| Box::pin(log_unread(site)),
        config: |config| config.replace("warn,credbroker::server=info", "debug"),
        ..ROW
    },
    Row {
        name: "audit-disk-full",
        how: "the audit log is on a full disk",
        unit: "lines",
        start: |site| Box::pin(disk_full(site)),
        disk: Some(Disk::Small),
        ..ON_DISK
    },
    Row {
        name: "audit-disk-hangs",
        how: "the audit log is on a disk that hangs (FUSE), once for 30 s",
        unit: "requests",
        start: |site| Box::pin(disk_hangs(site)),
        disk: Some(Disk::Hanging),
        min_block: Duration::from_secs(30),
        ..ON_DISK
    },
];

/// A fault that is on.
pub(crate) struct Fault {
    tasks: Vec<JoinHandle<()>>,
    met: Met,
    /// [`Met`] before it started.
    before: u64,
    /// How much must meet the fault before cancels are measured.
    enough: u64,
}

/// Where the calls, connections, frames or bytes that meet the fault are counted.
enum Met {
    /// Audit lines that the broker could not write.
    AuditFailures,
    /// By the client that causes it: connections that the broker keeps open, or what it has received.
    Client(Arc<AtomicU64>),
    /// Requests that the hanging disk has kept waiting.
    Disk,
    /// Requests that the simulated KuCoin has received.
    Kucoin,
    /// Bytes in the pipe.
    Log,
    /// Requests that the simulated Vault has received.
    Vault,
}

impl Fault {
    /// Starts the fault of a row, and waits until enough has met it.
    pub(crate) async fn start(row: &Row, site: &Site) -> Self {
        let fault = (row.start)(site).await;
        let deadline = Instant::now() + MET_WITHIN;
        while fault.met(site).await < fault.enough {
            if Instant::now() > deadline {
                let met = fault.met(site).await;
                print_always(&format!(
                    "{}: only {met} of {} met the fault",
                    row.name, fault.enough
                ));
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        fault
    }

    pub(crate) async fn met(&self, site: &Site) -> u64 {
        self.met.count(site).await.saturating_sub(self.before)
    }

    pub(crate) async fn end(self, site: &Site) {
        self.tasks.iter().for_each(JoinHandle::abort);
        site.repair().await;
    }

    /// A fault without tasks.
    async fn new(site: &Site, met: Met, enough: u64) -> Self {
        Self {
            tasks: Vec::new(),
            before: met.count(site).await,
            met,
            enough,
        }
    }

    /// A fault whose tasks count what meets it.
    fn counted(enough: u64) -> (Self, Arc<AtomicU64>) {
        let count = Arc::<AtomicU64>::default();
        let fault = Self {
            tasks: Vec::new(),
            met: Met::Client(Arc::clone(&count)),
            before: 0,
            enough,
        };
        (fault, count)
    }

    fn spawn(&mut self, site: &Site, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(site.flooding.spawn(task));
    }

    /// Repeats calls on this connection, this many at a time. A refused call is repeated after a second.
    fn poll(
        &mut self,
        site: &Site,
        connection: &Patient,
        count: usize,
        request: fn() -> SignAndSendRequest,
    ) {
        for _ in 0..count {
            let client = Bot::over(connection.clone()).client;
            let mut bot = Bot {
                client: client.max_decoding_message_size(usize::MAX),
            };
            self.spawn(site, async move {
                loop {
                    let pause_ms = if bot.send(request()).await.is_ok() {
                        10
                    } else {
                        1000
                    };
                    sleep(Duration::from_millis(pause_ms)).await;
                }
            });
        }
    }
}

impl Met {
    async fn count(&self, site: &Site) -> u64 {
        let hits = |answer: Value| answer["hits"].as_u64().unwrap();
        match self {
            Self::AuditFailures => {
                let metrics = get(site.lab.ops, "/metrics").await.unwrap_or_default();
                let mut lines = metrics.lines();
                let count =
                    lines.find_map(|line| line.strip_prefix("credbroker_audit_failures_total "));
                count.map_or(0, |count| count.parse().unwrap())
            }
            Self::Client(count) => count.load(Ordering::Relaxed),
            Self::Disk => site.hanging_disk.as_ref().unwrap().kept_waiting(),
            Self::Kucoin => hits(site.kucoin.control("GET", "fault", Value::Null).await),
            Self::Log => site.lab.process.as_ref().unwrap().unread_log(),
            Self::Vault => hits(site.vault.control("GET", "fault", Value::Null).await),
        }
    }
}

/// Adds a fault of the simulated KuCoin.
async fn kucoin_fault(site: &Site, path: &str, action: Value) {
    let fault = json!({"path": path, "method": if path == ORDERS { "POST" } else { "GET" }, "action": action});
    site.kucoin.control("POST", "fault", fault).await;
}

async fn hung_reads(site: &Site, bots: usize) -> Fault {
    let mut fault = Fault::new(site, Met::Kucoin, 200 * bots as u64).await;
    kucoin_fault(site, ACCOUNTS, json!({"hold": {}})).await;
    for bot in 0..bots {
        let connection = site.connection(&format!("bot-{bot}")).await.unwrap();
        fault.poll(site, &connection, 300, accounts);
    }
    fault
}

async fn hung_orders(site: &Site) -> Fault {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut fault = Fault::new(site, Met::Kucoin, 8).await;
    kucoin_fault(site, ORDERS, json!({"hold": {}})).await;
    let connection = site.connection("bot-0").await.unwrap();
    fault.poll(site, &connection, 8, || {
        spot_order(&format!("hung-{}", NUMBER.fetch_add(1, Ordering::Relaxed)))
    });
    fault
}

/// Reads whose answers have this fault, on a connection of their own: cancels do not wait behind their bytes.
async fn polled_answers(site: &Site, action: Value, count: usize) -> Fault {
    let mut fault = Fault::new(site, Met::Kucoin, count as u64).await;
    kucoin_fault(site, ACCOUNTS, action).await;
    let (address, identity) = (site.lab.grpc, site.lab.ca.bot("bot-0").unwrap());
    let roots = [site.lab.ca.certificate_pem().to_owned()];
    let connecting = async move { patient(address, &roots, &identity).await };
    // Its bytes are read on the runtime of the floods, too.
    let connection = site.flooding.spawn(connecting).await.unwrap().unwrap();
    fault.poll(site, &connection, count, accounts);
    fault
}

fn idle(site: &Site, bots: usize, enough: u64) -> Fault {
    let (mut fault, count) = Fault::counted(enough);
    for bot in 0..bots {
        let (address, connector) = site.dial(&format!("idle-{bot}"));
        let count = Arc::clone(&count);
        fault.spawn(site, async move {
            // Dropped with this task.
            let mut open = JoinSet::new();
            for _ in 0..64 {
                if let Ok(stream) = tls(address, &connector).await {
                    let count = Arc::clone(&count);
                    open.spawn(async move { keep_open(stream, &count).await });
                }
            }
            std::future::pending::<()>().await;
        });
    }
    fault
}

/// Counts a connection as long as the broker keeps it open.
async fn keep_open(mut stream: impl tokio::io::AsyncRead + Unpin, count: &AtomicU64) {
    count.fetch_add(1, Ordering::Relaxed);
    let mut buffer = [0; 1024];
    while stream
        .read(&mut buffer)
        .await
        .is_ok_and(|length| length > 0)
    {}
    count.fetch_sub(1, Ordering::Relaxed);
}

/// Bots that read large answers at most this many bytes at a time. Counts bytes; with a window of zero, requests.
async fn slow_readers(site: &Site, window: u32) -> Fault {
    let (mut fault, count) = match window {
        0 => (Fault::new(site, Met::Kucoin, 20).await, Arc::default()),
        _ => Fault::counted(20),
    };
    kucoin_fault(site, ACCOUNTS, json!({"oversized": {"megabytes": 3}})).await;
    for bot in 0..8 {
        let (address, connector) = site.dial(&format!("bot-{bot}"));
        let count = Arc::clone(&count);
        fault.spawn(site, async move {
            loop {
                // Ends when the broker closes the connection.
                let _ = read_slowly(address, &connector, window, &count).await;
                sleep(Duration::from_secs(1)).await;
            }
        });
    }
    fault
}

async fn read_slowly(
    address: SocketAddr,
    connector: &TlsConnector,
    window: u32,
    count: &AtomicU64,
) -> io::Result<()> {
    let setting = [
        &INITIAL_WINDOW_SIZE.to_be_bytes()[..],
        &window.to_be_bytes(),
    ]
    .concat();
    let mut bot = RawBot::over(tls(address, connector).await?, &setting).await?;
    for _ in 0..8 {
        bot.call(&accounts()).await;
    }
    loop {
        let (kind, stream, payload) = bot.read().await?;
        let length = u32::try_from(payload.len()).unwrap();
        if kind == DATA && length > 0 {
            count.fetch_add(length.into(), Ordering::Relaxed);
            for stream in [0, stream] {
                bot.write(WINDOW_UPDATE, 0, stream, &length.to_be_bytes())
                    .await;
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Flood {
    Priority,
    WindowUpdate,
    Unknown,
    EmptyData,
}

/// Eight peers that send frames as fast as the broker reads them.
fn flood(site: &Site, kind: Flood) -> Fault {
    let (mut fault, count) = Fault::counted(20_000);
    for bot in 0..8 {
        let (address, connector) = site.dial(&format!("bot-{bot}"));
        let count = Arc::clone(&count);
        fault.spawn(site, async move {
            loop {
                // A new connection, since streams end after the request timeout.
                let sending = send_frames(address, &connector, kind, &count);
                let _ = timeout(Duration::from_secs(5), sending).await;
                sleep(Duration::from_millis(50)).await;
            }
        });
    }
    fault
}

async fn send_frames(
    address: SocketAddr,
    connector: &TlsConnector,
    kind: Flood,
    count: &AtomicU64,
) -> io::Result<()> {
    const FRAMES: usize = 1000;
    let mut bot = RawBot::over(tls(address, connector).await?, &[]).await?;
    let one = match kind {
        Flood::Priority => frame(PRIORITY, 0, 99, &[0, 0, 0, 0, 1]),
        Flood::WindowUpdate => frame(WINDOW_UPDATE, 0, 0, &1_u32.to_be_bytes()),
        Flood::Unknown => frame(0x42, 0, 0, &[]),
        Flood::EmptyData => frame(DATA, 0, bot.head(&[]).await, &[]),
    };
    let frames = one.repeat(FRAMES);
    loop {
        bot.stream.write_all(&frames).await?;
        count.fetch_add(FRAMES as u64, Ordering::Relaxed);
    }
}

async fn vault_endless(site: &Site) -> Fault {
    let fault = Fault::new(site, Met::Vault, 1).await;
    let endless = json!({"kind": "endless"});
    site.vault.control("POST", "fault", endless).await;
    fault
}

/// Connections on which nothing is sent; each is opened again when the broker closes it.
fn silent(site: &Site, address: SocketAddr, connections: u64, enough: u64) -> Fault {
    let (mut fault, count) = Fault::counted(enough);
    for _ in 0..connections {
        let count = Arc::clone(&count);
        fault.spawn(site, async move {
            loop {
                if let Ok(stream) = TcpStream::connect(address).await {
                    keep_open(stream, &count).await;
                }
                sleep(Duration::from_millis(100)).await;
            }
        });
    }
    fault
}

async fn log_unread(site: &Site) -> Fault {
    let mut fault = Fault::new(site, Met::Log, 60_000).await;
    site.lab.process.as_ref().unwrap().pause_log(true);
    let connection = site.connection("bot-0").await.unwrap();
    fault.poll(site, &connection, 4, accounts);
    fault
}

async fn disk_full(site: &Site) -> Fault {
    let fault = Fault::new(site, Met::AuditFailures, 0).await;
    site.small_disk.as_ref().unwrap().fill();
    fault
}

async fn disk_hangs(site: &Site) -> Fault {
    let fault = Fault::new(site, Met::Disk, 1).await;
    site.hanging_disk.as_ref().unwrap().hang(true);
    fault
}
