//! Applies answers of the exchange to the broker's own state: its time, its egress address, its keys, and unknown codes.

use std::collections::BTreeSet;

use super::{Broker, Call};
use crate::base::lock::Mutex;
use crate::base::outcome::Outcome;
use crate::keyring::KeyLease;
use crate::keyring::usage::Refusal;
use crate::kucoin::code::{
    self, ADDRESS_REFUSED, CREDENTIALS_REFUSED, KEY_REFUSED, RefusalCode, TIMESTAMP_REFUSED,
};
use crate::kucoin::{Answer, Product, Scope, advice, broker_query};
use crate::policy::Permit;

/// Unknown codes that have been logged. Each is logged once per run.
#[derive(Debug, Default)]
pub(crate) struct UnknownCodes(Mutex<BTreeSet<(Scope, Option<Product>, String)>>);

/// After this many different codes no more are logged, since the exchange chooses them. The metric counts all.
const MAX_UNKNOWN_CODES: usize = 256;

impl UnknownCodes {
    /// Adds a code; returns whether to log it.
    fn insert_if_new(&self, scope: Scope, product: Option<Product>, code: &str) -> bool {
        let mut known = self.0.lock();
        known.len() < MAX_UNKNOWN_CODES && known.insert((scope, product, code.to_owned()))
    }
}

impl Broker {
    /// Applies an answer to the state of the broker: its time, its egress address, its key.
    pub(super) fn apply_feedback(
        &self,
        call: &Call,
        permit: &Permit,
        lease: Option<&KeyLease>,
        answer: &Answer,
    ) {
        if let Some(lease) = lease {
            let refused = KEY_REFUSED.contains(&answer.code.as_str());
            if answer.outcome == Outcome::Accepted {
                lease.usage.accepted(self.clock.wall_ms());
            } else if answer.outcome == Outcome::Rejected && refused {
                let is_new = lease.usage.refused(Refusal {
                    code: answer.code.clone(),
                    advice: advice::for_bot(
                        answer,
                        permit.scope(),
                        permit.endpoint(),
                        self.proof.expected(),
                    ),
                    at_ms: self.clock.wall_ms(),
                });
                if is_new && call.key.is_none() {
                    self.keyring.request_refresh(permit);
                }
            }
        }
        if answer.outcome == Outcome::Accepted {
            self.dead_man.accepted(&call.request, permit.endpoint());
        }
        if answer.is_of_unknown_code {
            self.note_unknown_code(permit, &answer.code);
        }
        match answer.code.as_str() {
            // A rejection in a key test is about the tested key, and its caller reports it; a rejected timestamp is not.
            code if code != TIMESTAMP_REFUSED && call.key.is_some() => {}
            ADDRESS_REFUSED => {
                let seen = broker_query::address_in(&answer.msg);
                self.proof.refused(seen, self.clock.boot());
                self.metrics.addresses_refused.inc();
                let seen = seen.map(|address| address.to_string());
                tracing::error!(
                    account.id = %permit.account().id,
                    egress.address = seen,
                    "egress IP not whitelisted for this key; compare the address that the exchange saw with egress.expected_ip and the key's IP restriction"
                );
                self.rechecks.address();
            }
            code if CREDENTIALS_REFUSED.contains(&code) => {
                self.metrics.credentials_refused.inc();
                tracing::error!(
                    account.id = %permit.account().id,
                    exchange.code = code,
                    "exchange rejected this key, its passphrase or its signature; compare the key in Vault with KuCoin's key page"
                );
            }
            TIMESTAMP_REFUSED => {
                self.metrics.timestamps_refused.inc();
                self.rechecks.time();
            }
            _ => {}
        }
    }

    /// Counts an unknown code that makes the outcome `maybe_sent`, and logs it once.
    fn note_unknown_code(&self, permit: &Permit, full_code: &str) {
        let labels = [("scope", permit.scope().as_str())];
        self.metrics.codes_unknown.get_or_create(&labels).inc();
        let product = permit.endpoint().map(|endpoint| endpoint.product);
        let code: String = full_code.chars().take(code::MAX_CODE_CHARS).collect();
        if self
            .unknown_codes
            .insert_if_new(permit.scope(), product, &code)
        {
            let (endpoint, scope) = (permit.endpoint_id(), permit.scope());
            if let Ok(refusal) = RefusalCode::new(scope.host(), product, full_code) {
                tracing::warn!(
                    endpoint,
                    %scope,
                    exchange.code = ?code,
                    refusal_code = ?refusal.to_string(),
                    "unknown code; outcome is maybe_sent; if KuCoin documents it as a rejection, add the value of refusal_code to exchange.refusal_codes"
                );
            } else {
                tracing::warn!(
                    endpoint,
                    %scope,
                    exchange.code = ?code,
                    "unknown code; outcome is maybe_sent; the code cannot be listed in exchange.refusal_codes, so report it as a credbroker bug"
                );
            }
        }
    }
}
