//! `/_sim/`: lets another process control the simulator over HTTP. Not part of Vault's API.
//!
//! | Request | Body |
//! |---|---|
//! | `POST fault` | a [`FaultRule`] to add |
//! | `DELETE fault` | removes all faults |
//! | `GET fault` | answers `{"hits": 3}`: how many requests faults have hit |
//! | `POST seal`, `POST unseal` | |
//! | `POST fail-over` | the other listener becomes the active node |
//! | `POST advance` | `{"seconds": 60}` moves the clock ahead |
//! | `POST secret` | `{"mount": "kv", "path": "a/b", "data": {...}}` writes a version; creates the mount if needed |
//! | `DELETE secret` | `{"mount": "kv", "path": "a/b"}` soft-deletes the newest version |
//! | `DELETE metadata` | `{"mount": "kv", "path": "a/b"}` deletes the path with all its versions |
//! | `DELETE mount` | `{"mount": "kv"}` removes a mount |
//! | `POST denial`, `DELETE denial` | `{"path": "kv/*"}`, optionally with `token` and `method` |
//! | `POST token` | `{"seconds": 3600}` creates a token; the answer contains it as `token` |
//! | `DELETE token` | `{"token": "..."}` revokes it |

use std::time::Duration;

use bytes::Bytes;
use http::Response;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::answer::response;
use super::core::Core;
use super::faults::FaultRule;
use crate::http::Received;

#[derive(Deserialize)]
struct Seconds {
    seconds: u64,
}

#[derive(Deserialize)]
struct SecretPath {
    mount: String,
    path: String,
}

#[derive(Deserialize)]
struct NewSecret {
    mount: String,
    path: String,
    data: Value,
}

#[derive(Deserialize)]
struct Mount {
    mount: String,
}

#[derive(Deserialize)]
struct Denial {
    token: Option<String>,
    method: Option<String>,
    path: String,
}

#[derive(Deserialize)]
struct Token {
    token: String,
}

/// Executes a control request; `None` if it is not one.
pub(super) fn control(core: &mut Core, received: &Received) -> Option<Response<Bytes>> {
    let command = received.head.uri.path().strip_prefix("/_sim/")?;
    Some(match execute(core, received, command) {
        Ok(Some(answer)) => response(200, &answer),
        Ok(None) => response(404, &json!({ "simulator": "no such control request" })),
        Err(problem) => response(400, &json!({ "simulator": problem.to_string() })),
    })
}

/// The answer; `None` if there is no such command.
fn execute(
    core: &mut Core,
    received: &Received,
    command: &str,
) -> Result<Option<Value>, serde_json::Error> {
    fn body<T: DeserializeOwned>(received: &Received) -> Result<T, serde_json::Error> {
        serde_json::from_slice(&received.body)
    }
    let now = core.now();
    match (received.head.method.as_str(), command) {
        ("POST", "advance") => {
            let Seconds { seconds } = body(received)?;
            core.clock.advance(Duration::from_secs(seconds));
        }
        ("POST", "denial") => {
            let denial: Denial = body(received)?;
            let (token, method) = (denial.token.as_deref(), denial.method.as_deref());
            core.denials.add(token, method, &denial.path);
        }
        ("DELETE", "denial") => {
            let denial: Denial = body(received)?;
            let (token, method) = (denial.token.as_deref(), denial.method.as_deref());
            core.denials.remove(token, method, &denial.path);
        }
        ("POST", "fail-over") => core.active = core.active.other(),
        ("POST", "fault") => core.faults.add(body::<FaultRule>(received)?),
        ("DELETE", "fault") => core.faults.clear(),
        ("GET", "fault") => return Ok(Some(json!({ "hits": core.faults.hits }))),
        ("DELETE", "metadata") => {
            let SecretPath { mount, path } = body(received)?;
            if let Some(kv) = core.kv.get_mut(&mount) {
                kv.delete_metadata(&path);
            }
        }
        ("DELETE", "mount") => {
            let Mount { mount } = body(received)?;
            core.kv.remove(&mount);
        }
        ("POST", "seal") => core.seal.close(),
        ("POST", "unseal") => core.seal.open(),
        ("POST", "secret") => {
            let NewSecret { mount, path, data } = body(received)?;
            core.kv.entry(mount).or_default().put(&path, data, now);
        }
        ("DELETE", "secret") => {
            let SecretPath { mount, path } = body(received)?;
            if let Some(kv) = core.kv.get_mut(&mount) {
                kv.delete_latest(&path, now);
            }
        }
        ("POST", "token") => {
            let Seconds { seconds } = body(received)?;
            let token = core.create_token(Duration::from_secs(seconds));
            return Ok(Some(json!({ "token": token })));
        }
        ("DELETE", "token") => {
            let Token { token } = body(received)?;
            core.tokens.revoke(&token);
        }
        _ => return Ok(None),
    }
    Ok(Some(json!({ "simulator": "done" })))
}
