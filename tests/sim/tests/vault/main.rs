//! The simulated Vault against the recorded requests and answers of a real server, and what only the simulator does:
//! faults, a clock to move, a standby, stop and restart; a reviewer of its own.
#![expect(
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests may fail as loudly as tests"
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
