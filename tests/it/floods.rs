//! Peers that send as much as they can: other bots' calls take about as long as before.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use credbroker::proto::{Method, Scope};
use credbroker_sim::installation::Settings;
use credbroker_sim::kucoin::{Fault, FaultAction};
use rustls::pki_types::ServerName;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_rustls::TlsConnector;

use crate::connections::OPEN;
use crate::harness::{Bot, Lab, Patient, accounts, print_always, request, until};
use crate::raw_bot::{
    CONTINUATION, DATA, END_HEADERS, HEADERS, PING, PRIORITY, RawBot, SETTINGS, WINDOW_UPDATE,
    frame,
};

/// What a peer floods its connection with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Flood {
    Continuation,
    Data,
    Headers,
    Ping,
    Priority,
    Settings,
    Unknown,
    WindowUpdate,
}

impl Flood {
    pub(crate) const ALL: [Self; 8] = [
        Self::Continuation,
        Self::Data,
        Self::Headers,
        Self::Ping,
        Self::Priority,
        Self::Settings,
        Self::Unknown,
        Self::WindowUpdate,
    ];

    /// Whether the HTTP library closes a connection that is flooded with it.
    pub(crate) fn is_ended(self) -> bool {
        matches!(self, Self::Continuation | Self::Data | Self::Headers)
    }

    /// The smallest frame of this kind for a stream; `stream` is open, and those above it are idle.
    fn frame(self, stream: u32) -> Vec<u8> {
        match self {
            Self::Continuation => frame(CONTINUATION, 0, stream, &[]),
            Self::Data => frame(DATA, 0, stream, &[]),
            Self::Headers => frame(HEADERS, END_HEADERS, stream, &[]),
            Self::Ping => frame(PING, 0, 0, &[7; 8]),
            Self::Priority => frame(PRIORITY, 0, 99, &[0, 0, 0, 0, 1]),
            Self::Settings => frame(SETTINGS, 0, 0, &[]),
            Self::Unknown => frame(0x42, 0, 0, &[]),
            Self::WindowUpdate => frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]),
        }
    }
}

/// Peers in a thread of their own that flood the broker while they are switched on.
pub(crate) struct Flooders {
    is_on: watch::Sender<bool>,
    /// Frames that were sent.
    pub(crate) frames: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flooders {
    /// `count` connections to `address` with this identity, which stay quiet at first.
    pub(crate) fn start(
        address: SocketAddr,
        connector: &TlsConnector,
        flood: Flood,
        count: usize,
    ) -> Self {
        let (is_on, watched) = watch::channel(false);
        let frames = Arc::<AtomicU64>::default();
        let (connector, sent) = (connector.clone(), Arc::clone(&frames));
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().unwrap();
            runtime.block_on(async {
                for _ in 0..count {
                    let (connector, sent) = (connector.clone(), Arc::clone(&sent));
                    let mut is_on = watched.clone();
                    tokio::spawn(async move {
                        while is_on.wait_for(|is_on| *is_on).await.is_ok() {
                            // A connection that the broker closes is opened again.
                            send(address, &connector, flood, &mut is_on, &sent).await;
                        }
                    });
                }
                let mut watched = watched;
                while watched.changed().await.is_ok() {}
            });
        });
        Self {
            is_on,
            frames,
            thread: Some(thread),
        }
    }

    pub(crate) fn switch(&self, is_on: bool) {
        self.is_on.send_replace(is_on);
    }
}

impl Drop for Flooders {
    fn drop(&mut self) {
        self.is_on = watch::channel(false).0;
        let _ = self.thread.take().unwrap().join();
    }
}

/// Floods a new connection until the broker closes it, with pauses while `is_on` is false.
async fn send(
    address: SocketAddr,
    connector: &TlsConnector,
    flood: Flood,
    is_on: &mut watch::Receiver<bool>,
    sent: &AtomicU64,
) {
    let socket = TcpSocket::new_v4().unwrap();
    // Otherwise filling the buffers takes this machine's time for long.
    socket.set_send_buffer_size(64 * 1024).unwrap();
    let Ok(stream) = socket.connect(address).await else {
        return sleep(Duration::from_millis(10)).await;
    };
    let name = ServerName::try_from("localhost").unwrap();
    let Ok(stream) = connector.connect(name, stream).await else {
        return sleep(Duration::from_millis(10)).await;
    };
    let mut bot = RawBot::over(stream, &[]).await.unwrap();
    let mut stream = 1;
    match flood {
        Flood::Continuation => {
            let start = frame(HEADERS, 0, stream, &[]);
            let _ = bot.stream.write_all(&start).await;
        }
        Flood::Data => stream = bot.head(&[]).await,
        _ => {}
    }
    let (mut reader, mut writer) = tokio::io::split(bot.stream);
    let ignored = tokio::spawn(async move {
        let mut buffer = vec![0; 16 * 1024];
        while reader.read(&mut buffer).await.is_ok_and(|bytes| bytes > 0) {}
    });
    while !ignored.is_finished() && is_on.wait_for(|is_on| *is_on).await.is_ok() {
        let mut frames = Vec::new();
        for _ in 0..500 {
            frames.extend(flood.frame(stream));
            if flood == Flood::Headers {
                stream += 2;
            }
        }
        if writer.write_all(&frames).await.is_err() {
            break;
        }
        sent.fetch_add(500, Ordering::Relaxed);
        // More than the broker reads, but not all of this machine's time.
        sleep(Duration::from_millis(5)).await;
    }
    ignored.abort();
    sleep(Duration::from_millis(10)).await;
}

/// The median duration of `count` reads.
pub(crate) async fn median(bot: &mut Bot<Patient>, count: usize) -> Duration {
    let mut took = Vec::new();
    for _ in 0..count {
        let began = Instant::now();
        bot.send(accounts()).await.unwrap();
        took.push(began.elapsed());
    }
    took.sort();
    took[count / 2]
}

#[tokio::test]
async fn eight_peers_that_flood_with_frames_slow_other_bots_down_little() {
    let mut lab = Lab::with(Settings {
        process: true,
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    median(&mut bot, 50).await;
    let peer = lab.client_tls(&lab.ca.bot("reader").unwrap());
    for flood in Flood::ALL.into_iter().filter(|flood| !flood.is_ended()) {
        // On a machine that is busy with other tests, the best of a few tries.
        let mut tries = Vec::new();
        for _ in 0..6 {
            let alone = median(&mut bot, 30).await;
            let flooders = Flooders::start(lab.grpc, &peer, flood, 8);
            flooders.switch(true);
            until("the peers are connected", async || {
                lab.metric(OPEN).await == Some(9.0)
            })
            .await;
            until("the peers have used up their bursts", async || {
                flooders.frames.load(Ordering::Relaxed) > 8 * 20_000
            })
            .await;
            let flooded = median(&mut bot, 30).await;
            drop(flooders);
            until("the peers are gone", async || {
                lab.metric(OPEN).await == Some(1.0)
            })
            .await;
            tries.push(flooded.as_secs_f64() / alone.as_secs_f64());
            // Usually less than 3 in a debug build, and more than 50 without a limit of frames.
            if tries.iter().any(|&ratio| ratio < 12.0) {
                break;
            }
        }
        print_always(&format!("{flood:?}: {tries:?}"));
        assert!(
            tries.iter().any(|&ratio| ratio < 12.0),
            "{flood:?}: {tries:?}"
        );
    }
    lab.process().terminate();
    lab.process().exit_code().await;
}

#[tokio::test]
async fn large_requests_and_answers_arrive_in_time_at_the_lowest_rate() {
    let mut lab = Lab::with(Settings {
        config: "[limits]\nread_bytes_per_second = 1000000\nbody_bytes = 4194304".to_owned(),
        egress: "max_answer_bytes = 8000000".to_owned(),
        ..Settings::default()
    })
    .await;
    let mut bot = lab.patient_bot("maker").await;
    bot.client = bot.client.max_decoding_message_size(16 << 20);
    // The first second's bytes are not limited.
    let least = Duration::from_millis(2900);
    let body = json!({"clientOid": "large", "symbol": "BTC-USDT", "side": "buy", "type": "limit", "price": "1", "size": "1",
        "remark": "x".repeat(4_000_000)});
    let target = "/api/v1/hf/orders";
    let order = request(Scope::SpotMargin, Method::Post, target, &body.to_string());
    let began = Instant::now();
    let limit = Duration::from_secs(60);
    bot.send_within(order, limit).await.unwrap();
    assert!(began.elapsed() >= least, "{:?}", began.elapsed());

    let oversized = FaultAction::Oversized { megabytes: 4 };
    lab.kucoin.fault(Fault::once("/api/v1/accounts", oversized));
    let began = Instant::now();
    let answer = bot.send_within(accounts(), limit).await.unwrap();
    assert!(answer.body.len() >= 4_000_000);
    assert!(began.elapsed() >= least, "{:?}", began.elapsed());
    lab.stop().await;
}
