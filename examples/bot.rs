//! A bot in Rust: reads balances and tests an order. Run `cargo run --example bot -- ADDRESS FOLDER`; the demo prints both
//! arguments.
//!
//! docs/bots.md shows how to use this program in a project of your own.
#![expect(clippy::print_stdout, reason = "prints the answers")]

use credbroker::proto::broker_client::BrokerClient;
use credbroker::proto::{Method, Scope, SignAndSendRequest};
use std::error::Error;
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};
use tonic_types::StatusExt;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (address, folder) = arguments
        .next()
        .zip(arguments.next())
        .ok_or("usage: bot ADDRESS FOLDER")?;
    let read = |name: &str| {
        let file = Path::new(&folder).join(name);
        std::fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))
    };
    let tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(read("ca.pem")?))
        .identity(Identity::from_pem(read("bot.pem")?, read("bot.key")?));
    let channel = Endpoint::from_shared(format!("https://{address}"))?
        .tls_config(tls)?
        .connect()
        .await?;
    let mut broker = BrokerClient::new(channel);

    // `/api/v1/hf/orders/test` places nothing, so a fixed clientOid is enough. Each real order (`/api/v1/hf/orders`) needs a new
    // one, for example from the crate `uuid`.
    let order = r#"{"clientOid":"rust-1","side":"buy","symbol":"BTC-USDT","type":"limit","price":"10000","size":"0.001"}"#;
    // The exchange's clock minus this machine's, in milliseconds, from the latest answer.
    let mut offset_ms = None;
    let now_ms = || {
        let now = UNIX_EPOCH.elapsed().unwrap_or_default();
        i64::try_from(now.as_millis()).unwrap_or_default()
    };
    for (method, path, body) in [
        (Method::Get, "/api/v1/accounts", ""),
        (Method::Post, "/api/v1/hf/orders/test", order),
    ] {
        let mut request = tonic::Request::new(SignAndSendRequest {
            account: "alpha".to_owned(),
            scope: Scope::SpotMargin.into(),
            method: method.into(),
            path: path.to_owned(),
            body: body.into(),
            // An order that has not left the broker after 2 s is not sent.
            not_after_ms: offset_ms.map_or(0, |offset_ms| now_ms() + offset_ms + 2000),
            ..SignAndSendRequest::default()
        });
        request.set_timeout(Duration::from_secs(5));
        match broker.sign_and_send(request).await {
            Ok(answer) => {
                let answer = answer.into_inner();
                if answer.broker_time_ms != 0 {
                    offset_ms = Some(answer.broker_time_ms - now_ms());
                }
                let (outcome, body) = (
                    answer.outcome().as_str_name(),
                    String::from_utf8_lossy(&answer.body),
                );
                println!("{path}: HTTP {}, {outcome}: {body}", answer.http_status);
                // Empty unless the exchange rejected the request, or may have.
                if !answer.advice.is_empty() {
                    println!("{path}: {}", answer.advice);
                }
            }
            Err(status) => {
                // Without the broker's ErrorInfo, the transport failed, and the request may have been sent.
                let info = status.get_details_error_info();
                let info = info.filter(|info| info.domain == "credbroker");
                let reason = info.as_ref().map_or("TRANSPORT", |info| &info.reason);
                let outcome = info.as_ref().and_then(|info| info.metadata.get("outcome"));
                let outcome = outcome.map_or("maybe_sent", String::as_str);
                println!("{path}: {reason}, {outcome}: {}", status.message());
            }
        }
    }
    Ok(())
}
