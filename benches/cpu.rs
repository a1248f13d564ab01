//! CPU time of the broker per call, compared between two programs: for example this one, and one built from an earlier commit.
//!
//! Run `cargo bench --bench cpu -- PROGRAM [PROGRAM]`: paths of `credbroker`; the second one is by default this one. One bot
//! sends reads, one after the other, to each program in turn, once with the audit log in `/dev/null`, which needs no thread of
//! its own, and once in a file. Prints medians; compare them only within one run.
#![expect(
    clippy::cast_precision_loss,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a benchmark panics if it cannot continue"
)]

#[path = "../tests/it/drive.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod drive;
#[path = "../tests/it/harness.rs"]
#[allow(dead_code, reason = "shared with the tests, which use all of it")]
mod harness;

use credbroker_sim::installation::Settings;
use drive::{Simulator, TRADER, simulators};
use harness::{Bot, Lab, Patient, accounts};

const ROUNDS: usize = 15;
const CALLS_PER_ROUND: u32 = 2000;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        if !drive::simulate().await {
            compare().await;
        }
    });
}

/// A broker with simulators of its own.
struct Site {
    lab: Lab,
    bot: Bot<Patient>,
    _simulators: [Simulator; 2],
}

impl Site {
    async fn start(program: &str, audit: &str) -> Self {
        let (vault, kucoin, settings) = simulators(&[]).await;
        let mut lab = Lab::install(Settings {
            rules: TRADER.to_owned(),
            config: settings.config + audit,
            ..settings
        })
        .await;
        // Executes `program` instead of the one that was built with this bench.
        let command = format!("shift; exec '{program}' \"$@\"");
        lab.spawn_broker_under(&["sh", "-c", &command, "sh"]).await;
        lab.until_ready().await;
        Self {
            bot: lab.patient_bot("trader").await,
            lab,
            _simulators: [vault, kucoin],
        }
    }

    /// Microseconds of CPU time per call.
    async fn round(&mut self) -> f64 {
        let before = self.cpu_ns();
        for _ in 0..CALLS_PER_ROUND {
            self.bot.client.sign_and_send(accounts()).await.unwrap();
        }
        (self.cpu_ns() - before) as f64 / 1000.0 / f64::from(CALLS_PER_ROUND)
    }

    /// CPU time of all threads of the broker.
    fn cpu_ns(&mut self) -> u64 {
        let tasks = format!("/proc/{}/task", self.lab.process().id());
        let tasks = std::fs::read_dir(tasks).unwrap();
        tasks
            .map(|task| {
                let statistics = std::fs::read_to_string(task.unwrap().path().join("schedstat"));
                let statistics = statistics.unwrap();
                let running = statistics.split(' ').next().unwrap();
                running.parse::<u64>().unwrap()
            })
            .sum()
    }
}

async fn compare() {
    let mut programs: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    programs.push(env!("CARGO_BIN_EXE_credbroker").to_owned());
    assert!(programs.len() >= 2, "expected the path of a program");
    println!("| Audit log | First program, us | Second program, us | Change |");
    println!("|---|---|---|---|");
    for (name, audit) in [
        ("/dev/null", "\n[audit]\nfile = \"/dev/null\"\n"),
        ("file", ""),
    ] {
        let mut sites = [
            Site::start(&programs[0], audit).await,
            Site::start(&programs[1], audit).await,
        ];
        let mut rounds = [Vec::new(), Vec::new()];
        for round in 0..=ROUNDS {
            for (site, times) in sites.iter_mut().zip(&mut rounds) {
                let time = site.round().await;
                // The first round warms up.
                if round > 0 {
                    times.push(time);
                }
            }
        }
        let [first, second] = rounds.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        let change = (second / first - 1.0) * 100.0;
        println!("| {name} | {first:.1} | {second:.1} | {change:+.1} % |");
    }
}
