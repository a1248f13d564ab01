//! Listening sockets that the broker inherits from a supervisor, which keeps them open while the broker restarts.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use credbroker_sim::installation::Settings;
use tokio::net::TcpStream;

use crate::harness::{Bot, Lab, Process, accounts, patient, until};

/// Two sockets of a supervisor, and how it names them.
struct Supervisor {
    sockets: [TcpListener; 2],
    environment: &'static str,
}

impl Supervisor {
    /// With a short queue, which the broker has to make longer.
    fn new(environment: &'static str) -> Self {
        let socket = || {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
            socket.listen(8).unwrap().into_std().unwrap()
        };
        Self {
            sockets: [socket(), socket()],
            environment,
        }
    }

    fn address(&self, index: usize) -> SocketAddr {
        self.sockets[index].local_addr().unwrap()
    }

    /// Starts the broker. A shell passes the sockets on: stdin and stdout become descriptors 3 and 4.
    fn start(&self, lab: &Lab) -> Process {
        let script = format!(
            "exec 3<&0 4<&1 0</dev/null 1>&2; export LISTEN_FDS=2 {}; exec \"$@\"",
            self.environment
        );
        let stdio = |index: usize| -> Stdio {
            OwnedFd::from(self.sockets[index].try_clone().unwrap()).into()
        };
        let words = ["sh", "-c", &script, "sh"];
        Process::start_with(&words, &lab.path("config.toml"), stdio(0), stdio(1))
    }
}

async fn install() -> Lab {
    Lab::install(Settings {
        process: true,
        ..Settings::default()
    })
    .await
}

fn set_address(lab: &Lab, name: &str, address: SocketAddr) {
    let (from, to) = (
        format!("\n{name} = \"127.0.0.1:0\""),
        format!("\n{name} = \"{address}\""),
    );
    lab.reconfigure(&from, &to);
}

#[tokio::test]
async fn connections_wait_while_the_broker_restarts_and_none_is_refused() {
    const WAITING: usize = 100;
    let supervisor = Supervisor::new("LISTEN_PID=$$ LISTEN_FDNAMES=grpc:ops");
    let mut lab = install().await;
    set_address(&lab, "grpc", supervisor.address(0));
    set_address(&lab, "ops", supervisor.address(1));
    lab.adopt(supervisor.start(&lab)).await;
    let listening = lab.process().log_line("listening").await;
    assert_eq!(listening["inherited"], "grpc,ops");
    assert_eq!(
        (lab.grpc, lab.ops),
        (supervisor.address(0), supervisor.address(1))
    );
    lab.until_ready().await;

    // Calls one after the other, each on a new connection. The broker may close one that it accepted just before its exit.
    let identity = Arc::new(lab.ca.bot("maker").unwrap());
    let roots = [lab.ca.certificate_pem().to_owned()];
    let stop = Arc::new(AtomicBool::new(false));
    let (address, stopped) = (lab.grpc, Arc::clone(&stop));
    let (one, all) = (Arc::clone(&identity), roots.clone());
    let driver = tokio::spawn(async move {
        let mut answered = 0;
        while !stopped.load(Ordering::Relaxed) {
            TcpStream::connect(address).await.expect("refused");
            if let Ok(connection) = patient(address, &all, &one).await
                && Bot::over(connection).send(accounts()).await.is_ok()
            {
                answered += 1;
            }
        }
        answered
    });
    for _ in 0..2 {
        lab.process().terminate();
        assert_eq!(lab.process().exit_code().await, Some(0));
        let mut waiting = Vec::new();
        for _ in 0..WAITING {
            waiting.push(TcpStream::connect(lab.grpc).await.expect("refused"));
        }
        let calls: Vec<_> = (0..20)
            .map(|_| {
                let (identity, roots) = (Arc::clone(&identity), roots.clone());
                tokio::spawn(async move {
                    let connection = patient(address, &roots, &identity).await.unwrap();
                    Bot::over(connection).send(accounts()).await
                })
            })
            .collect();
        let probe = TcpStream::connect(lab.ops).await.expect("refused");
        lab.adopt(supervisor.start(&lab)).await;
        for call in calls {
            assert_eq!(call.await.unwrap().unwrap().code, "200000");
        }
        lab.until_ready().await;
        drop((waiting, probe));
    }
    stop.store(true, Ordering::Relaxed);
    assert!(driver.await.unwrap() > 0);
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
}

#[tokio::test]
async fn sockets_are_assigned_by_name_and_missing_ones_are_opened() {
    let supervisor = Supervisor::new("LISTEN_PID=$$ LISTEN_FDNAMES=admin:grpc");
    let mut lab = install().await;
    set_address(&lab, "admin", supervisor.address(0));
    set_address(&lab, "grpc", supervisor.address(1));
    lab.adopt(supervisor.start(&lab)).await;
    lab.until_ready().await;
    assert_eq!(
        (lab.admin, lab.grpc),
        (supervisor.address(0), supervisor.address(1))
    );
    lab.bot("maker").await.send(accounts()).await.unwrap();
    let halted = lab.admin_cli("anna", &["halt", "--all"]).await;
    assert_eq!(halted.code, Some(0), "{halted:?}");
}

#[tokio::test]
async fn sockets_for_another_process_are_ignored() {
    let supervisor = Supervisor::new("LISTEN_PID=1 LISTEN_FDNAMES=grpc:ops");
    let mut lab = install().await;
    lab.adopt(supervisor.start(&lab)).await;
    lab.until_ready().await;
    assert_ne!(lab.grpc, supervisor.address(0));
    assert!(lab.process().log_line("listening").await["inherited"].is_null());
}

#[tokio::test]
async fn inherited_socket_that_does_not_fit_the_configuration_is_a_start_error() {
    for (environment, expected) in [
        (
            "LISTEN_PID=$$ LISTEN_FDNAMES=ops:grpc",
            "socket grpc is bound to 127.0.0.1:",
        ),
        ("LISTEN_PID=$$", "socket grpc is bound to 127.0.0.1:"),
        (
            "LISTEN_PID=$$ LISTEN_FDNAMES=grpc:web",
            "unknown name \"web\" of a socket",
        ),
        (
            "LISTEN_PID=$$ LISTEN_FDNAMES=admin:ops",
            "a socket admin was passed, but listen.admin is not set",
        ),
    ] {
        let supervisor = Supervisor::new(environment);
        let lab = install().await;
        let elsewhere = Supervisor::new("");
        set_address(&lab, "grpc", elsewhere.address(0));
        set_address(&lab, "ops", supervisor.address(1));
        lab.reconfigure("\nadmin = \"127.0.0.1:0\"", "");
        // The port that the broker would open itself.
        drop(elsewhere);
        let mut process = supervisor.start(&lab);
        assert_eq!(process.exit_code().await, Some(1), "{environment}");
        let text = format!("cannot use the inherited sockets (LISTEN_FDS): {expected}");
        until("the cause is printed", async || {
            process.log().contains(&text)
        })
        .await;
    }
}
