//! One order per clientOid: refuses requests whose clientOids were used before, and records what became of the others.

use super::call::outcome_of;
use super::{Broker, BrokerError, Call, Overload, Receipt};
use crate::base::outcome::Outcome;
use crate::kucoin::{Endpoint, Malformed, Method, UnsignedRequest, placement};
use crate::orders::{ClaimError, Claims, Settled};
use crate::policy::Permit;

impl Broker {
    /// Whether an order of this call was sent before. Nothing else may refuse a placing call earlier: after `not_sent`, its bot
    /// would place the order a second time.
    ///
    /// # Errors
    /// When one of its clientOids was used before, or the rules do not allow such a request.
    fn check_repeated(&self, call: &Call, endpoint: Option<&Endpoint>) -> Result<(), BrokerError> {
        if call.request.method != Method::Post {
            return Ok(());
        }
        let now_ms = self.exchange_ms(&call.request);
        let Err(repeated) = self.orders.check(&call.request, endpoint, now_ms) else {
            return Ok(());
        };
        // Only a bot that may place the order learns about the earlier one.
        self.policy().authorize(&call.principal, &call.request)?;
        Err(BrokerError::Repeated(repeated))
    }

    /// Refuses a call of a bot whose clientOids were used before, and audits that; otherwise returns the call.
    pub(crate) async fn refuse_repeated(
        &self,
        call: Call,
        endpoint: Option<&Endpoint>,
    ) -> Result<Call, BrokerError> {
        match self.check_repeated(&call, endpoint) {
            Err(error @ BrokerError::Repeated(_)) => {
                let number = self.calls.next_number();
                self.deny(&call, number, &error).await;
                Err(error)
            }
            // The rules are checked when the call runs.
            _ => Ok(call),
        }
    }

    /// Checks and claims the clientOids of a call: the last check before its intent is recorded.
    pub(super) fn claim(&self, call: &Call, permit: &Permit) -> Result<Claims, BrokerError> {
        let Some(bot) = call.principal.bot() else {
            return Ok(Claims::default());
        };
        let endpoint = permit.endpoint();
        let endpoint = endpoint.filter(|endpoint| endpoint.claims_client_oids());
        let Some(endpoint) = endpoint else {
            return Ok(Claims::default());
        };
        if permit.requires_client_oid() {
            placement::check_client_oids(endpoint, &call.request)
                .map_err(|problem| BrokerError::Malformed(vec![problem]))?;
        }
        let tested = self.keyring.tested(permit);
        let info = tested
            .as_ref()
            .and_then(|tested| tested.report.info.as_ref());
        let uid = info.and_then(|info| info.uid.as_deref());
        let now_ms = self.clock.exchange(permit.destination()).ms;
        let claimed = self
            .orders
            .claim(bot, &call.request, Some(endpoint), uid, now_ms);
        claimed.map_err(|error| match error {
            ClaimError::Full(limit) => Overload::ClaimsOfBot(limit).into(),
            ClaimError::Repeated(repeated) => BrokerError::Repeated(repeated),
            ClaimError::Twice(oid) => BrokerError::Malformed(vec![Malformed::new(
                "body",
                format_args!("expected a clientOid of its own for each order, got {oid} twice"),
            )]),
        })
    }

    /// Records what became of the orders of a call.
    pub(super) fn settle(&self, claims: &Claims, ended: &Result<Receipt, BrokerError>) {
        let outcome = outcome_of(ended);
        self.orders.end_call(claims, outcome);
        let settled = match outcome {
            Some(Outcome::Accepted) => Settled::Accepted,
            Some(Outcome::NotSent | Outcome::Rejected) => Settled::NotPlaced,
            Some(Outcome::MaybeSent) | None => Settled::MaybeSent,
        };
        self.orders.settle(claims, settled, None);
    }

    /// The exchange's time for the account of a request; 0 while it is unknown, so that no claim seems to have ended.
    fn exchange_ms(&self, request: &UnsignedRequest) -> i64 {
        let policy = self.policy();
        match policy.account(&request.account) {
            Some(account) => {
                let time = self.clock.exchange((account.site, request.scope.host()));
                time.uncertainty.map_or(0, |_| time.ms)
            }
            None => 0,
        }
    }
}
