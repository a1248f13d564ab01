//! What an answer of the exchange says about the broker itself: its time, its address, its key, and codes that no table
//! has.

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

/// Unknown codes that have been logged: each is logged once in a run.
#[derive(Debug, Default)]
pub(crate) struct UnknownCodes(Mutex<BTreeSet<(Scope, Option<Product>, String)>>);

/// Past so many different ones nothing more is logged: the exchange chooses them, and the metric goes on counting.
const MAX_UNKNOWN_CODES: usize = 256;

impl UnknownCodes {
    /// Remembers the code; returns whether to log it.
    fn insert_if_new(&self, scope: Scope, product: Option<Product>, code: &str) -> bool {
        let mut known = self.0.lock();
        known.len() < MAX_UNKNOWN_CODES && known.insert((scope, product, code.to_owned()))
    }
}

impl Broker {
    /// Takes what an answer says about the broker itself: its time, its address, its key.
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
                let is_news = lease.usage.refused(Refusal {
                    code: answer.code.clone(),
                    advice: advice::for_bot(answer, permit.scope(), permit.endpoint()),
                    at_ms: self.clock.wall_ms(),
                });
                if is_news && call.key.is_none() {
                    self.keyring.request_refresh(permit);
                }
            }
        }
        if answer.is_of_unknown_code {
            self.note_unknown_code(permit, &answer.code);
        }
        match answer.code.as_str() {
            // Whoever tests a key is told what is wrong with it; it says nothing about the broker.
            code if code != TIMESTAMP_REFUSED && call.key.is_some() => {}
            ADDRESS_REFUSED => {
                let seen = broker_query::address_in(&answer.msg);
                self.proof.refused(seen, self.clock.boot());
                self.metrics.addresses_refused.inc();
                let seen = seen.map(|address| address.to_string());
                tracing::error!(
                    account.id = %permit.account().id,
                    seen,
                    "egress IP not whitelisted for this key; compare the key's IP restriction with egress.expected_ip"
                );
                self.rechecks.address();
            }
            code if CREDENTIALS_REFUSED.contains(&code) => {
                self.metrics.credentials_refused.inc();
                tracing::error!(
                    account.id = %permit.account().id,
                    code,
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

    /// Counts a code that leaves the outcome open, and logs it once.
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
                    code = ?code,
                    refusal_code = ?refusal.to_string(),
                    "unknown code; outcome is maybe_sent: if KuCoin documents it as a refusal, add it to exchange.refusal_codes"
                );
            } else {
                tracing::warn!(
                    endpoint,
                    %scope,
                    code = ?code,
                    "unknown code; outcome is maybe_sent: exchange.refusal_codes does not take it; report it as a credbroker bug"
                );
            }
        }
    }
}
