//! `GetOutcome`: what is known about an earlier call or order. It sends nothing, so it is served while accounts are halted and
//! while the broker stops.

use super::{Broker, BrokerError, Call};
use crate::base::ids::{AccountId, BotId, RequestId};
use crate::kucoin::Scope;
use crate::orders::{Claims, Known};
use crate::policy::{Denied, Permit};

impl Broker {
    /// Keeps what becomes of a call of a bot that changes something, from here on.
    pub(super) fn begin_call(&self, call: &Call, permit: &Permit, claims: &mut Claims) {
        if let Some(bot) = call.principal.bot().filter(|_| permit.changes()) {
            let now_ms = self.clock.exchange(permit.destination()).ms;
            let (id, endpoint) = (&call.request.id, permit.endpoint());
            self.orders.begin_call(bot, id, endpoint, claims, now_ms);
        }
    }

    /// What is known about the newest call of `bot` with this request id that left.
    ///
    /// # Errors
    /// When no rule names the bot, or it is blocked.
    pub(crate) fn known_call(&self, bot: &BotId, id: &RequestId) -> Result<Known, BrokerError> {
        if !self.policy().names(bot) {
            return Err(Denied::Caller(bot.clone()).into());
        }
        self.restrictions.check_bot(bot)?;
        // The account, and so its host, is not known: any host's time is near enough for a window of hours.
        // While none is known, no claim seems to have ended.
        let now_ms = self.clock.measured_ms(None).unwrap_or(0);
        Ok(self.orders.known_call(bot, id, now_ms))
    }

    /// What is known about the order with this clientOid.
    ///
    /// # Errors
    /// When the bot may not read the account in this scope, or is blocked.
    pub(crate) fn known_order(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
        client_oid: &str,
    ) -> Result<Known, BrokerError> {
        let policy = self.policy();
        let entry = policy.check_read(bot, account, scope)?;
        self.restrictions.check_bot(bot)?;
        let now_ms = self.trusted_ms((entry.site, scope.host()));
        Ok(self.orders.known_order(account, scope, client_oid, now_ms))
    }
}
