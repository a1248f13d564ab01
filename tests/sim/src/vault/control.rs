//! `/_sim/`: control of the simulator over HTTP, for when it runs as a process of its own. No part of Vault.
//!
//! `POST fault` with a [`FaultRule`](super::FaultRule), `DELETE fault` clears them all; `POST seal`; `POST unseal`;
//! `POST advance` with `{"seconds": 60}` moves the clock ahead.

use std::time::Duration;

use bytes::Bytes;
use http::Response;
use serde::Deserialize;
use serde_json::json;

use super::answer::response;
use super::core::Core;
use crate::http::Received;

#[derive(Deserialize)]
struct Advance {
    seconds: u64,
}

/// Carries out a control request, if it is one.
pub(super) fn control(core: &mut Core, received: &Received) -> Option<Response<Bytes>> {
    let command = received.head.uri.path().strip_prefix("/_sim/")?;
    let done = match (received.head.method.as_str(), command) {
        ("POST", "advance") => serde_json::from_slice(&received.body)
            .map(|Advance { seconds }| core.clock.advance(Duration::from_secs(seconds))),
        ("DELETE", "fault") => {
            core.faults.clear();
            Ok(())
        }
        ("POST", "fault") => {
            serde_json::from_slice(&received.body).map(|rule| core.faults.add(rule))
        }
        ("POST", "seal") => {
            core.seal.close();
            Ok(())
        }
        ("POST", "unseal") => {
            core.seal.open();
            Ok(())
        }
        _ => return Some(response(404, &json!({ "simulator": "no such control" }))),
    };
    Some(match done {
        Ok(()) => response(200, &json!({ "simulator": "done" })),
        Err(problem) => response(400, &json!({ "simulator": problem.to_string() })),
    })
}
