//! One order per clientOid: refuses requests whose clientOids were used before, and records what became of the others.

use super::{Broker, BrokerError, Call, Overload, Receipt};
use crate::base::outcome::Outcome;
use crate::clock::HostId;
use crate::kucoin::lookup::Lookup;
use crate::kucoin::{Endpoint, Malformed, Method, UnsignedRequest, placement};
use crate::orders::{ClaimError, Claims, OrderState, Repeated, Settled};
use crate::policy::Permit;

impl Broker {
    /// Whether an order of this call was sent before, or waits in another call. Nothing else may refuse a placing call earlier:
    /// after `not_sent`, its bot would place the order a second time.
    ///
    /// # Errors
    /// When one of its clientOids was used before, or the rules do not allow such a request.
    pub(super) fn check_repeated(
        &self,
        call: &Call,
        endpoint: Option<&Endpoint>,
    ) -> Result<(), BrokerError> {
        if call.request.method != Method::Post {
            return Ok(());
        }
        let now_ms = self.exchange_ms(&call.request);
        let repeated = match self.orders.check(&call.request, endpoint, now_ms) {
            Err(repeated) => repeated,
            Ok(()) => match self.waiting_order(call, endpoint) {
                Some(repeated) => repeated,
                None => return Ok(()),
            },
        };
        // Only a bot that may place the order learns about the earlier one.
        self.policy().authorize(&call.principal, &call.request)?;
        Err(BrokerError::Repeated(repeated))
    }

    /// The order of another call that waits for the rate limit and has a clientOid of this one.
    pub(super) fn waiting_order(
        &self,
        call: &Call,
        endpoint: Option<&Endpoint>,
    ) -> Option<Box<Repeated>> {
        let endpoint = endpoint.filter(|endpoint| endpoint.claims_client_oids())?;
        let oids = endpoint.client_oids(&call.request);
        let (account, scope) = (&call.request.account, call.request.scope);
        let oid = self.budgets.waits_with(account, scope, &oids)?;
        Some(Box::new(Repeated::in_flight(oid)))
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
        let uid = self.uid_of_key(permit);
        let now_ms = self.clock.exchange(permit.destination()).ms;
        let claimed = self
            .orders
            .claim(bot, &call.request, Some(endpoint), uid.as_deref(), now_ms);
        let mut claims = claimed.map_err(|error| match error {
            ClaimError::Full(limit) => Overload::ClaimsOfBot(limit).into(),
            ClaimError::Repeated(repeated) => BrokerError::Repeated(repeated),
            ClaimError::Twice(oid) => BrokerError::Malformed(vec![Malformed::new(
                "body",
                format_args!("expected a clientOid of its own for each order, got {oid} twice"),
            )]),
        })?;
        if !claims.is_empty() {
            let orders = placement::placements(endpoint, &call.request).unwrap_or_default();
            let lookups = orders
                .iter()
                .filter_map(|order| Lookup::new(endpoint, order));
            claims.can_be_looked_up(lookups.filter_map(|lookup| lookup.record()).collect());
        }
        Ok(claims)
    }

    /// The exchange's id of the account whose key the rules name for a request, if a key test has reported it.
    pub(super) fn uid_of_key(&self, permit: &Permit) -> Option<String> {
        let tested = self.keyring.tested(permit)?;
        tested.report.info.as_ref()?.uid.clone()
    }

    /// The exchange's time for the account of a request, for the end of claims.
    fn exchange_ms(&self, request: &UnsignedRequest) -> i64 {
        let policy = self.policy();
        let account = policy.account(&request.account);
        account.map_or(0, |account| {
            self.trusted_ms((account.site, request.scope.host()))
        })
    }

    /// The time of a host; 0 while it is uncertain, so that no claim seems to have ended.
    pub(super) fn trusted_ms(&self, host_id: HostId) -> i64 {
        match self.clock.check(host_id) {
            Ok(()) => self.clock.exchange(host_id).ms,
            Err(_) => 0,
        }
    }
}

/// What became of an order of a call with this result.
pub(super) fn became(ended: &Result<Receipt, BrokerError>, client_oid: &str) -> Settled {
    let (outcome, order_id) = match ended {
        Err(BrokerError::Repeated(earlier)) => {
            return match earlier.state {
                OrderState::Accepted => Settled::Accepted(earlier.order_id.clone()),
                _ => Settled::Unknown,
            };
        }
        Err(error) => (error.outcome(), None),
        Ok(receipt) if receipt.answer.items.is_empty() => {
            let form = receipt
                .endpoint
                .and_then(|endpoint| endpoint.order.as_ref());
            let order_id = form.and_then(|form| form.order_id(&receipt.answer.body));
            (Some(receipt.answer.outcome), order_id)
        }
        Ok(receipt) => {
            let items = receipt.answer.items.iter();
            let mut items = items.filter(|item| item.client_oid == client_oid);
            match (items.next(), items.next()) {
                (Some(item), None) => (Some(item.outcome), Some(item.order_id.clone())),
                // Results that contradict each other, or none.
                _ => (None, None),
            }
        }
    };
    match outcome {
        Some(Outcome::Accepted) => Settled::Accepted(order_id.filter(|id| !id.is_empty())),
        Some(Outcome::NotSent | Outcome::Rejected) => Settled::NotPlaced,
        Some(Outcome::MaybeSent) | None => Settled::MaybeSent,
    }
}
