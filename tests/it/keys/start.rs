//! At the start, bots are accepted once every key was read or failed to be read; admins and health checks at once.

use std::time::Duration;

use credbroker::proto::{ListKeysRequest, Outcome, SignAndSendResponse};
use credbroker_sim::installation::Settings;
use credbroker_sim::proxy::Proxy;
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tonic::Status;

use crate::harness::{Bot, Lab, Time, patient, refusal, spot_cancel_all};

const KEYS_READ: &str = "initial key load and checks of the exchange finished; accepting bots";

const TOO_LONG: &str =
    "initial key load and checks of the exchange not finished within 10 s; accepting bots";

/// An installation whose connections to Vault pass a `Proxy`, with a long time limit for requests to Vault.
async fn installed() -> (Lab, Proxy) {
    let lab = Lab::install(Settings::default()).await;
    let proxy = Proxy::to(&lab.vault.address()).await.unwrap();
    let address = format!("http://{}", proxy.address);
    lab.reconfigure(&lab.vault.address(), &address);
    lab.reconfigure("timeout_ms = 1000", "timeout_ms = 60000");
    (lab, proxy)
}

/// Connects a bot and sends a cancel, without a time limit.
fn cancel(lab: &Lab) -> JoinHandle<Result<SignAndSendResponse, Status>> {
    let identity = lab.ca.bot("maker").unwrap();
    let (address, roots) = (lab.grpc, [lab.ca.certificate_pem().to_owned()]);
    tokio::spawn(async move {
        let connection = patient(address, &roots, &identity).await.unwrap();
        Bot::over(connection).send(spot_cancel_all()).await
    })
}

#[tokio::test]
async fn bots_wait_for_the_first_read_of_all_keys_but_admins_do_not() {
    let (mut lab, proxy) = installed().await;
    proxy.hold();
    lab.start_broker().await;
    drop(TcpStream::connect(lab.grpc).await.unwrap());
    let cancelled = cancel(&lab);
    assert_eq!(lab.get("/healthz").await.0, 200);
    let (status, text) = lab.get("/readyz").await;
    assert_eq!(status, 503);
    let waiting = "key main/main: waiting for Vault: not read from Vault yet";
    assert!(text.contains(waiting), "{text}");
    let mut admin = lab.admin_client("anna").await;
    admin.list_keys(ListKeysRequest {}).await.unwrap();
    for words in [&["halt", "main"][..], &["resume", "main"]] {
        let output = lab.admin_cli("anna", words).await;
        assert_eq!(output.code, Some(0), "{output:?}");
    }
    assert!(!cancelled.is_finished(), "{:?}", cancelled.await);
    proxy.open();
    let answer = cancelled.await.unwrap().unwrap();
    assert_eq!(answer.outcome(), Outcome::Accepted, "{answer:?}");
    lab.stop().await;
}

#[tokio::test]
async fn bots_wait_at_most_ten_seconds_for_a_vault_that_does_not_respond() {
    let (mut lab, proxy) = installed().await;
    proxy.silence();
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    let cancelled = cancel(&lab);
    time.pass(&lab, Duration::from_secs(5)).await;
    assert!(!cancelled.is_finished(), "{:?}", cancelled.await);
    time.pass(&lab, Duration::from_secs(6)).await;
    assert_eq!(refusal(cancelled.await.unwrap()).1, "KEY_UNAVAILABLE");
    lab.stop().await;
}

#[tokio::test]
async fn unreachable_vault_does_not_delay_the_start() {
    let mut lab = Lab::install(Settings::default()).await;
    lab.vault.stop().await.unwrap();
    lab.spawn_broker().await;
    let status = cancel(&lab).await.unwrap().unwrap_err();
    let message = status.message();
    assert!(message.contains("cannot reach Vault"), "{message}");
    lab.process().terminate();
    assert_eq!(lab.process().exit_code().await, Some(0));
    let log = lab.process().log();
    assert_eq!(log.matches(KEYS_READ).count(), 1, "{log}");
    assert!(!log.contains(TOO_LONG), "{log}");
}

#[tokio::test]
async fn broker_waiting_for_its_keys_shuts_down_at_once() {
    let (mut lab, proxy) = installed().await;
    proxy.silence();
    let time = Time::new(0);
    lab.start_broker_on(time.clock()).await;
    let cancelled = cancel(&lab);
    lab.stop().await;
    // The bot was never accepted.
    assert!(cancelled.await.is_err());
}
