//! Tests of the simulated Vault: against recorded requests and answers of a real server, and for what only the
//! simulator has: faults, an adjustable clock, a standby, stop and restart, a reviewer for Kubernetes logins.
#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "test helpers may panic, as tests do"
)]

mod behaviour;
mod client;
mod faults;
mod logins;
mod recording;

use std::time::Duration;

use credbroker_sim::vault::VaultSim;
use serde_json::json;

use client::{Answer, call};

const ROOT: &str = "sim-root";
const SECRET: &str = "/v1/kv/data/kucoin/prod/main";

/// A dev server with one secret, and a token to read it.
async fn with_secret() -> (VaultSim, String) {
    let sim = VaultSim::start_dev(ROOT).await.unwrap();
    sim.put_secret("kv", "kucoin/prod/main", json!({ "api_key": "fake-key" }));
    let token = sim.create_token(Duration::from_secs(3600));
    (sim, token)
}

async fn read(sim: &VaultSim, token: &str) -> Answer {
    call("GET", SECRET)
        .header("X-Vault-Token", token)
        .send(&sim.address())
        .await
}
