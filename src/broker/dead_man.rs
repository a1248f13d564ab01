//! KuCoin's dead-man switch: which requests that set its timer pass like cancels.
//!
//! A bot renews the timer all the time. If a renewal were refused, for example while its account is halted, KuCoin would
//! cancel all orders of the symbols when the timer ends, stop orders included.

use std::collections::{BTreeSet, HashMap};
use std::ops::RangeInclusive;

use serde::Deserialize;

use crate::base::ids::AccountId;
use crate::base::lock::Mutex;
use crate::kucoin::{Endpoint, UnsignedRequest};

/// The endpoint that sets the timer. The one of the unified account (`dcp/set`) is risk-increasing: its fields are not
/// documented.
const ENDPOINT: &str = "spot.post.v1-hf-orders-dead-cancel-all";

/// Seconds of a timer that is renewed. KuCoin accepts up to 86,400; a longer timer protects less.
///
/// Source of the range of KuCoin: documentation of the endpoint ("Set DCP").
const RENEWED: RangeInclusive<i64> = 5..=300;

/// The symbols of each account's timer, as last set through this broker since its start.
#[derive(Debug, Default)]
pub(crate) struct DeadManSwitches(Mutex<HashMap<AccountId, Symbols>>);

#[derive(Clone, Debug, Eq, PartialEq)]
enum Symbols {
    All,
    Named(BTreeSet<String>),
}

/// The body of a request. With an unknown or a repeated field, its meaning is unclear.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Setting {
    /// Seconds; -1 removes the timer.
    timeout: i64,
    /// Separated by commas; all symbols if it is empty or missing.
    symbols: Option<String>,
}

impl Setting {
    fn of(request: &UnsignedRequest, endpoint: Option<&Endpoint>) -> Option<Self> {
        let is_set = endpoint.is_some_and(|endpoint| endpoint.id == ENDPOINT);
        is_set.then(|| serde_json::from_slice(&request.body).ok())?
    }

    fn symbols(&self) -> Symbols {
        let names = self.symbols.as_deref().unwrap_or_default().split(',');
        let names = names.map(str::trim).filter(|name| !name.is_empty());
        let names: BTreeSet<_> = names.map(str::to_owned).collect();
        if names.is_empty() {
            Symbols::All
        } else {
            Symbols::Named(names)
        }
    }
}

impl Symbols {
    fn contains(&self, others: &Self) -> bool {
        match (self, others) {
            (Self::All, _) => true,
            (Self::Named(_), Self::All) => false,
            (Self::Named(names), Self::Named(others)) => names.is_superset(others),
        }
    }
}

impl DeadManSwitches {
    /// Whether the request keeps the protection that is set, or sets the first one, and so passes like a cancel.
    pub(crate) fn is_renewal(
        &self,
        request: &UnsignedRequest,
        endpoint: Option<&Endpoint>,
    ) -> bool {
        Setting::of(request, endpoint).is_some_and(|setting| {
            let switches = self.0.lock();
            let last = switches.get(&request.account);
            RENEWED.contains(&setting.timeout)
                && last.is_none_or(|last| setting.symbols().contains(last))
        })
    }

    /// Remembers what the exchange has accepted.
    pub(super) fn accepted(&self, request: &UnsignedRequest, endpoint: Option<&Endpoint>) {
        if let Some(setting) = Setting::of(request, endpoint) {
            let mut switches = self.0.lock();
            if setting.timeout > 0 {
                switches.insert(request.account.clone(), setting.symbols());
            } else {
                switches.remove(&request.account);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kucoin::{Catalog, Method, Scope, Target};

    fn request(account: &str, body: &str) -> UnsignedRequest {
        UnsignedRequest {
            account: account.parse().unwrap(),
            scope: Scope::SpotMargin,
            method: Method::Post,
            target: Target::new("/api/v1/hf/orders/dead-cancel-all", Vec::new()).unwrap(),
            body: body.to_owned().into(),
            id: "id".parse().unwrap(),
            body_client_oids: Vec::new(),
        }
    }

    #[test]
    fn timers_of_5_to_300_s_that_keep_all_symbols_are_renewals() {
        let switches = DeadManSwitches::default();
        let endpoint = Catalog::get().by_id(ENDPOINT);
        assert!(endpoint.is_some_and(Endpoint::increases_risk));
        let is_renewal = |body: &str| switches.is_renewal(&request("main", body), endpoint);
        let accepted = |body: &str| switches.accepted(&request("main", body), endpoint);
        for (body, expected) in [
            (r#"{"timeout":4}"#, false),
            (r#"{"timeout":5}"#, true),
            (r#"{"timeout":300,"symbols":"BTC-USDT"}"#, true),
            (r#"{"timeout":301}"#, false),
            (r#"{"timeout":-1}"#, false),
            (r#"{"timeout":"5"}"#, false),
            (r#"{"timeout":5,"timeout":-1}"#, false),
            (r#"{"timeout":5,"symbols":["BTC-USDT"]}"#, false),
            (r#"{"timeout":5,"cancel":true}"#, false),
            ("", false),
        ] {
            assert_eq!(is_renewal(body), expected, "{body}");
        }
        accepted(r#"{"timeout":900,"symbols":"BTC-USDT, ETH-USDT"}"#);
        for (symbols, expected) in [
            ("BTC-USDT,ETH-USDT", true),
            ("KCS-USDT,ETH-USDT,BTC-USDT", true),
            ("", true),
            ("BTC-USDT", false),
        ] {
            let body = format!(r#"{{"timeout":10,"symbols":"{symbols}"}}"#);
            assert_eq!(is_renewal(&body), expected, "{body}");
        }
        let other = request("other", r#"{"timeout":10,"symbols":"BTC-USDT"}"#);
        assert!(switches.is_renewal(&other, endpoint), "another account");
        accepted(r#"{"timeout":10}"#);
        assert!(!is_renewal(
            r#"{"timeout":10,"symbols":"BTC-USDT,ETH-USDT"}"#
        ));
        accepted(r#"{"timeout":-1}"#);
        assert!(is_renewal(r#"{"timeout":10,"symbols":"BTC-USDT"}"#));
        let order = Catalog::get().by_id("spot.post.v1-hf-orders");
        assert!(!switches.is_renewal(&request("main", r#"{"timeout":10}"#), order));
    }
}
