//! KuCoin's rules: what a request may look like, how it is signed, what an answer means.
//!
//! No I/O, no clock, no async: everything here is a function of its arguments. The sources are KuCoin's public API
//! documentation; each item names its page.

pub mod advice;
pub(crate) mod answer;
pub(crate) mod batch;
pub(crate) mod broker_query;
pub(crate) mod cancel_scope;
pub(crate) mod catalog;
pub(crate) mod code;
#[allow(dead_code, reason = "the guard of clientOids will use it")]
mod decimal;
mod fields;
pub(crate) mod key_info;
#[allow(dead_code, reason = "the guard of clientOids will use it")]
pub(crate) mod lookup;
#[allow(dead_code, reason = "the guard of clientOids will use it")]
pub(crate) mod not_found;
pub(crate) mod open_orders;
#[allow(dead_code, reason = "the guard of clientOids will use it")]
mod order_form;
#[allow(dead_code, reason = "the guard of clientOids will use it")]
pub(crate) mod placement;
pub(crate) mod pointer;
pub(crate) mod quota;
pub(crate) mod request;
pub(crate) mod schema;
pub mod sign;
pub(crate) mod target;

use std::fmt;

use serde::Deserialize;

pub(crate) use answer::{Answer, RequestContext};
pub(crate) use batch::BatchItem;
pub use catalog::Catalog;
pub(crate) use catalog::{Effect, Endpoint, Product, Risk};
pub use request::UnsignedRequest;
pub(crate) use request::{Malformed, RequestLimits};
pub use sign::{Key, KeyVersion, OutboundRequest, Partner, sign, unsigned};
pub use target::Target;

/// What an account's key is used for; it decides the host.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Classic futures.
    Futures,
    /// Classic spot and margin, with their account endpoints.
    SpotMargin,
    /// Unified trading account.
    Unified,
}

impl Scope {
    pub(crate) const ALL: [Self; 3] = [Self::Futures, Self::SpotMargin, Self::Unified];

    /// Its name in rules, logs, metrics and audit lines.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Futures => "futures",
            Self::SpotMargin => "spot-margin",
            Self::Unified => "unified",
        }
    }

    /// The host that serves this scope. Source: KuCoin API documentation, "Introduction", base URLs.
    pub(crate) fn host(self) -> Host {
        match self {
            Self::Futures => Host::Futures,
            Self::SpotMargin | Self::Unified => Host::Spot,
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One of the two hosts of a site that the broker connects to.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Host {
    /// Classic futures.
    Futures,
    /// Everything else.
    Spot,
}

impl Host {
    /// Its name in the configuration, logs and metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Futures => "futures",
            Self::Spot => "spot",
        }
    }
}

/// HTTP methods that KuCoin's endpoints use; its SDKs reject any other.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "UPPERCASE")]
pub enum Method {
    /// DELETE
    Delete,
    /// GET
    Get,
    /// POST
    Post,
}

impl Method {
    /// Upper case, as on the wire and in the string-to-sign.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Delete => "DELETE",
            Self::Get => "GET",
            Self::Post => "POST",
        }
    }

    /// The method as the HTTP library's type.
    pub(crate) fn as_http(self) -> http::Method {
        match self {
            Self::Delete => http::Method::DELETE,
            Self::Get => http::Method::GET,
            Self::Post => http::Method::POST,
        }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The KuCoin site that an account belongs to; keys of one site do not exist on another.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "lowercase")]
pub enum Site {
    /// Australia: the global hosts, with a header that selects the site.
    Au,
    /// European Union: spot and margin only.
    Eu,
    /// The global site.
    #[default]
    Global,
    /// Turkey: spot only.
    Tr,
}

impl Site {
    pub(crate) const ALL: [Self; 4] = [Self::Au, Self::Eu, Self::Global, Self::Tr];

    /// Its name in the rules.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Au => "au",
            Self::Eu => "eu",
            Self::Global => "global",
            Self::Tr => "tr",
        }
    }

    /// DNS name of a host of this site; `None` if the site has no such host.
    ///
    /// Source: KuCoin API documentation, "Introduction"; the EU and Turkish documentation.
    pub(crate) fn dns_name(self, host: Host) -> Option<&'static str> {
        match (self, host) {
            (Self::Au | Self::Global, Host::Futures) => Some("api-futures.kucoin.com"),
            (Self::Au | Self::Global, Host::Spot) => Some("api.kucoin.com"),
            (Self::Eu, Host::Spot) => Some("api.kucoin.eu"),
            (Self::Tr, Host::Spot) => Some("api.kucoin.tr"),
            (Self::Eu | Self::Tr, Host::Futures) => None,
        }
    }

    /// Whether the site offers `scope`.
    pub(crate) fn serves(self, scope: Scope) -> bool {
        match self {
            Self::Au | Self::Global => true,
            Self::Eu | Self::Tr => scope == Scope::SpotMargin,
        }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
