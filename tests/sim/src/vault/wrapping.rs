//! Response wrapping: single-use tokens, each for one answer.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::answer::{Answer, Logical, Outcome, Refusal};
use super::clock::rfc3339;
use super::ids::Ids;
use super::request::Request;
use super::tokens::Tokens;

/// Wrapped answers by wrapping token.
#[derive(Default)]
pub(super) struct Wraps(BTreeMap<String, Wrapped>);

struct Wrapped {
    answer: Logical,
    created: SystemTime,
    creation_path: String,
    ttl: Duration,
}

impl Wraps {
    /// Stores `answer` for `ttl` and returns the answer with the wrapping token.
    pub(super) fn wrap(
        &mut self,
        answer: Logical,
        ttl: Duration,
        request: &Request,
        ids: &mut Ids,
    ) -> Answer {
        let token = ids.token();
        let mut info = json!({
            "token": token,
            "accessor": ids.accessor(),
            "ttl": ttl.as_secs(),
            "creation_time": rfc3339(request.now),
            "creation_path": request.path,
        });
        if let (Some(info), Some(accessor)) = (info.as_object_mut(), answer.accessor()) {
            info.insert("wrapped_accessor".to_owned(), accessor.clone());
        }
        let wrapped = Wrapped {
            answer,
            created: request.now,
            creation_path: request.path.clone(),
            ttl,
        };
        self.0.insert(token, wrapped);
        let mut body = Logical::data(Value::Null).envelope("");
        if let Some(body) = body.as_object_mut() {
            body.insert("wrap_info".to_owned(), info);
        }
        Answer::Plain(200, body)
    }

    /// Removes expired answers.
    pub(super) fn sweep(&mut self, now: SystemTime) {
        self.0
            .retain(|_, wrapped| wrapped.created + wrapped.ttl > now);
    }

    /// Spends a wrapping token that was sent as client token; returns whether it was a wrapping token.
    pub(super) fn consume(&mut self, token: &str) -> bool {
        self.0.remove(token).is_some()
    }

    /// Answers `sys/wrapping/lookup`, which needs no client token and does not spend the wrapping token.
    pub(super) fn lookup(&self, request: &Request) -> Outcome {
        let token = request.body.text("token").or(request.token.as_deref());
        let wrapped = self
            .0
            .get(token.unwrap_or_default())
            .ok_or_else(no_such_token)?;
        let data = json!({
            "creation_path": wrapped.creation_path,
            "creation_time": rfc3339(wrapped.created),
            "creation_ttl": wrapped.ttl.as_secs(),
        });
        Ok(Logical::data(data).into())
    }

    /// Answers `sys/wrapping/unwrap`: the wrapping token is the client token, or is in the body, with another client token.
    pub(super) fn unwrap(&mut self, request: &Request, tokens: &mut Tokens) -> Outcome {
        let client = request.token.as_deref().unwrap_or_default();
        let in_body = request.body.text("token").filter(|token| !token.is_empty());
        let token = in_body.unwrap_or(client);
        if !self.0.contains_key(token) {
            return Err(no_such_token());
        }
        if in_body == Some(client) {
            // As in the server: its use as client token spends the wrapping token, so nothing can be unwrapped.
            self.0.remove(token);
            return Err(Refusal::routed(
                500,
                "error decrementing wrapping token's use-count: invalid token entry provided for use \
                 count decrementing",
            ));
        }
        if in_body.is_some() {
            tokens.authenticate(client, request.peer)?;
        }
        let wrapped = self.0.remove(token).ok_or_else(no_such_token)?;
        tokens.revoke_if_used_up(client);
        Ok(wrapped.answer.into())
    }
}

fn no_such_token() -> Refusal {
    Refusal::bad_request("wrapping token is not valid or does not exist")
}
