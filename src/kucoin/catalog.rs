//! The catalogue of KuCoin's endpoints: scope, risk class and effect on orders.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;

use serde::Deserialize;

use super::order_form::{ClientOidLocation, OrderForm, Requirement};
use super::quota::Pool;
use super::{Host, Method, Scope, UnsignedRequest};

/// Compiled from the official SDK specifications and documentation; `risk`, `effect` and `idempotent` are our own judgement.
const ENDPOINTS: &str = include_str!("endpoints.json");

static CATALOG: LazyLock<Catalog> = LazyLock::new(|| {
    #[expect(clippy::expect_used, reason = "compiled in, and a test parses it")]
    let endpoints: Vec<Endpoint> =
        serde_json::from_str(ENDPOINTS).expect("endpoints.json matches `Endpoint`");
    Catalog::new(endpoints)
});

/// One endpoint.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    /// Name in rules, logs and audit lines, such as `spot.post.v1-hf-orders`.
    pub id: String,
    /// HTTP method.
    pub(crate) method: Method,
    /// Path; `{name}` is a parameter and ends its segment, which may start with text: `level2_{size}`.
    pub(crate) path: String,
    /// KuCoin's product.
    pub(crate) product: Product,
    /// The scope it belongs to; `None` for the host of exchange brokers, which credbroker does not use.
    pub(crate) scope: Option<Scope>,
    /// The permission that a key needs, as KuCoin's page names it; `None` if none is needed or it is unknown.
    pub(crate) permission: Option<String>,
    /// Its rate limit pool; `None` if KuCoin does not publish it.
    #[serde(default)]
    pub(crate) rate_limit_pool: Option<Pool>,
    /// What a request takes from the pool; `None` if KuCoin does not publish it.
    #[serde(default)]
    pub(crate) weight: Option<u32>,
    /// What a call can do to the account.
    pub risk: Risk,
    /// What a call does to orders.
    pub(crate) effect: Effect,
    /// Whether sending it twice has the same effect as sending it once.
    pub idempotent: bool,
    /// Whether rules may grant it at all: false if it creates, changes, returns or deletes API keys.
    #[serde(default = "yes")]
    pub(crate) grantable: bool,
    /// Whether a master account's key can read other accounts with it: sub-accounts, or invited users.
    #[serde(default)]
    pub(crate) reads_other_accounts: bool,
    /// Whether KuCoin has ever documented it.
    pub(crate) status: Status,
    /// Codes that mean success in addition to `200000`, from KuCoin's documentation of the endpoint.
    #[serde(default)]
    pub(crate) success_codes: Vec<String>,
    /// Where it carries orders; `None` if it carries none.
    #[serde(default)]
    pub(crate) order: Option<OrderForm>,
    /// Its position in the catalogue.
    #[serde(skip)]
    pub(crate) number: u16,
}

/// Whether an endpoint was ever documented, as far as the rules need it.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Status {
    /// Found only in a client library: its effect is a guess, and no class includes it.
    Undocumented,
    /// Everything else: documented now or in the past.
    #[serde(other)]
    Known,
}

/// KuCoin's products, in its own words. Source: the catalogue's `product`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Product {
    /// Accounts, sub-accounts, deposits, transfers, withdrawals.
    Account,
    /// Affiliates.
    Affiliate,
    /// Brokers.
    Broker,
    /// Conversions.
    Convert,
    /// Copy trading.
    CopyTrading,
    /// Earn.
    Earn,
    /// Futures.
    Futures,
    /// Margin trading and lending.
    Margin,
    /// Market data.
    Market,
    /// Spot trading.
    Spot,
    /// The unified account.
    Unified,
    /// Loans to VIPs.
    VipLending,
}

impl Product {
    pub(crate) const ALL: [Self; 12] = [
        Self::Account,
        Self::Affiliate,
        Self::Broker,
        Self::Convert,
        Self::CopyTrading,
        Self::Earn,
        Self::Futures,
        Self::Margin,
        Self::Market,
        Self::Spot,
        Self::Unified,
        Self::VipLending,
    ];

    /// Its name in the catalogue and the configuration.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::Affiliate => "affiliate",
            Self::Broker => "broker",
            Self::Convert => "convert",
            Self::CopyTrading => "copytrading",
            Self::Earn => "earn",
            Self::Futures => "futures",
            Self::Margin => "margin",
            Self::Market => "market",
            Self::Spot => "spot",
            Self::Unified => "unified",
            Self::VipLending => "viplending",
        }
    }
}

fn yes() -> bool {
    true
}

/// What a call can do to the account in the worst case.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "kebab-case")]
pub enum Risk {
    /// Changes sub-accounts, API keys, account mode.
    AccountAdmin,
    /// Creates or reads deposit addresses.
    DepositAddress,
    /// Needs no key.
    Public,
    /// Reads, and order tests.
    Read,
    /// Returns a token for private WebSocket streams.
    Token,
    /// Places, changes or cancels orders.
    Trade,
    /// Changes leverage, margin mode or position mode.
    TradeConfig,
    /// Moves money between accounts.
    Transfer,
    /// Borrows, repays, converts, subscribes, redeems.
    ValueMove,
    /// Withdraws money from KuCoin.
    Withdraw,
    /// Cancels a withdrawal.
    WithdrawCancel,
}

impl Risk {
    pub(crate) const ALL: [Self; 11] = [
        Self::AccountAdmin,
        Self::DepositAddress,
        Self::Public,
        Self::Read,
        Self::Token,
        Self::Trade,
        Self::TradeConfig,
        Self::Transfer,
        Self::ValueMove,
        Self::Withdraw,
        Self::WithdrawCancel,
    ];

    /// Its name in rules.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AccountAdmin => "account-admin",
            Self::DepositAddress => "deposit-address",
            Self::Public => "public",
            Self::Read => "read",
            Self::Token => "token",
            Self::Trade => "trade",
            Self::TradeConfig => "trade-config",
            Self::Transfer => "transfer",
            Self::ValueMove => "value-move",
            Self::Withdraw => "withdraw",
            Self::WithdrawCancel => "withdraw-cancel",
        }
    }

    /// Whether a rule may grant the class; endpoints of other classes are granted one by one.
    pub(crate) fn grantable_as_class(self) -> bool {
        matches!(
            self,
            Self::Public | Self::Read | Self::Trade | Self::TradeConfig
        )
    }

    /// Whether it moves money or creates keys, so that the account needs `allow_money_out`.
    pub fn moves_money(self) -> bool {
        match self {
            Self::AccountAdmin
            | Self::DepositAddress
            | Self::Transfer
            | Self::ValueMove
            | Self::Withdraw
            | Self::WithdrawCancel => true,
            Self::Public | Self::Read | Self::Token | Self::Trade | Self::TradeConfig => false,
        }
    }
}

/// What a call does to orders.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Effect {
    /// Changes an order.
    Amend,
    /// Cancels named orders.
    Cancel,
    /// Cancels all orders, or all that match.
    CancelAll,
    /// No effect on orders.
    None,
    /// Places orders.
    Place,
    /// Validates an order without placing it.
    Test,
}

impl Endpoint {
    /// Whether it cancels orders. Cancels are the last calls to be refused when something is wrong.
    pub(crate) fn is_cancel(&self) -> bool {
        matches!(self.effect, Effect::Cancel | Effect::CancelAll)
    }

    /// Whether each clientOid may be used only once with it: it places orders, or moves money.
    pub(crate) fn claims_client_oids(&self) -> bool {
        self.effect == Effect::Place || self.risk == Risk::Transfer
    }

    /// Whether a call changes nothing on the exchange.
    pub(crate) fn is_read(&self) -> bool {
        matches!(self.risk, Risk::Public | Risk::Read)
    }

    /// Whether a call amends an order.
    pub(crate) fn amends(&self) -> bool {
        self.effect == Effect::Amend
    }

    /// Whether a call is risk-increasing: everything except cancels, order tests, reads and public data. When something is
    /// wrong, risk-increasing calls are the first to be refused.
    pub(crate) fn increases_risk(&self) -> bool {
        let reduces = matches!(
            self.effect,
            Effect::Cancel | Effect::CancelAll | Effect::Test
        );
        !reduces && !matches!(self.risk, Risk::Public | Risk::Read)
    }

    /// Whether it places orders that no read finds by their clientOid.
    pub(crate) fn lacks_lookup(&self) -> bool {
        let lookup = self.order.as_ref().and_then(|order| order.lookup.as_ref());
        self.effect == Effect::Place && lookup.is_none()
    }

    /// Whether the exchange accepts orders without a clientOid here, at least some.
    pub(crate) fn accepts_orders_without_client_oid(&self) -> bool {
        let order = self.order.as_ref();
        self.effect == Effect::Place
            && order.is_some_and(|order| {
                order.client_oid.is_some()
                    && !matches!(order.requires_client_oid, Requirement::Always)
            })
    }

    /// The class that grants it; `None` if a rule must name its id.
    pub(crate) fn class(&self) -> Option<Risk> {
        let by_class = self.status != Status::Undocumented
            && self.risk.grantable_as_class()
            && !self.lacks_lookup();
        by_class.then_some(self.risk)
    }

    /// Whether it needs a signature.
    pub(crate) fn is_private(&self) -> bool {
        self.risk != Risk::Public
    }

    /// The clientOids of the orders in `request`.
    pub(crate) fn client_oids<'r>(&self, request: &'r UnsignedRequest) -> Vec<&'r str> {
        let location = self
            .order
            .as_ref()
            .and_then(|order| order.client_oid.as_ref());
        match location {
            None => Vec::new(),
            Some(ClientOidLocation::Body(_)) => request
                .body_client_oids
                .iter()
                .map(String::as_str)
                .collect(),
            Some(ClientOidLocation::Path(name)) => {
                let found = self.path_parameter(name, request.target.path());
                found.into_iter().collect()
            }
            Some(ClientOidLocation::Query(name)) => {
                let named = request.target.query().iter().filter(|(n, _)| n == name);
                named.map(|(_, value)| value.as_str()).collect()
            }
        }
    }

    /// Whether the answer `body` has a clientOid that is not in `request`, so that it belongs to another request.
    ///
    /// Always false for a cancel that also has order ids, since the exchange may answer with clientOids that are not in the
    /// request, and for an amendment, since it is not documented which clientOid its answer has. For each order of a batch
    /// without a clientOid the exchange may choose one, so that many other clientOids are allowed.
    pub(crate) fn has_foreign_client_oid(&self, request: &UnsignedRequest, body: &[u8]) -> bool {
        let Some(order) = self.order.as_ref() else {
            return false;
        };
        let Some(pointer) = &order.answer_client_oid else {
            return false;
        };
        let sent = self.client_oids(request);
        let is_other = |oid: &&String| !oid.is_empty() && !sent.contains(&oid.as_str());
        let by_id = || {
            let id = b"\"orderId";
            request.body.windows(id.len()).any(|part| part == id)
        };
        let returns_sent_oids = match self.effect {
            Effect::Place => true,
            Effect::Cancel => !by_id(),
            Effect::Amend | Effect::CancelAll | Effect::None | Effect::Test => false,
        };
        if !returns_sent_oids || sent.is_empty() {
            return false;
        }
        let others = pointer.strings(body).iter().filter(is_other).count();
        let unnamed = || match &order.client_oid {
            Some(ClientOidLocation::Body(pointer)) => {
                pointer.count(&request.body).saturating_sub(sent.len())
            }
            _ => 0,
        };
        others > 0 && others > unnamed()
    }

    /// The value that `path` has for the parameter `{name}`.
    pub(crate) fn path_parameter<'p>(&self, name: &str, path: &'p str) -> Option<&'p str> {
        self.path
            .split('/')
            .zip(path.split('/'))
            .find_map(|(segment, value)| match parameter(segment) {
                Some((before, found)) if found == name => value.strip_prefix(before),
                _ => None,
            })
    }
}

/// The parts of a segment that ends in a parameter: the text before it, and its name.
fn parameter(segment: &str) -> Option<(&str, &str)> {
    segment.strip_suffix('}')?.split_once('{')
}

/// All endpoints, found by name or by scope, method and path.
#[derive(Debug)]
pub struct Catalog {
    endpoints: Vec<Endpoint>,
    by_id: HashMap<String, usize>,
    routes: HashMap<(Option<Scope>, Method), Node>,
    /// Literal paths of each host, of all scopes and methods, by [`normalized`] path: their last segment is never an id.
    literals: HashMap<(Host, String), usize>,
}

/// The result of looking a path up in the catalogue.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Found<'c> {
    /// This endpoint.
    Endpoint(&'c Endpoint),
    /// Not in the catalogue, but a lax router would match it to the literal path of this endpoint.
    Lookalike(&'c Endpoint),
    /// Matches a template, but is the literal path of this endpoint, which has another method or scope.
    NotAnId(&'c Endpoint),
    /// This endpoint of another scope, or of a host that credbroker does not use.
    OtherScope(&'c Endpoint),
    /// Not in the catalogue.
    Unlisted,
}

#[derive(Debug, Default)]
struct Node {
    literal: HashMap<String, Node>,
    /// Segments that end in a parameter, by the text before it.
    parameters: BTreeMap<String, Node>,
    endpoint: Option<usize>,
}

impl Catalog {
    /// The compiled-in catalogue.
    pub fn get() -> &'static Self {
        &CATALOG
    }

    fn new(mut endpoints: Vec<Endpoint>) -> Self {
        for (number, endpoint) in (0..).zip(&mut endpoints) {
            endpoint.number = number;
        }
        let mut by_id = HashMap::new();
        let mut routes: HashMap<_, Node> = HashMap::new();
        let mut literals = HashMap::new();
        for (index, endpoint) in endpoints.iter().enumerate() {
            by_id.insert(endpoint.id.clone(), index);
            let mut node = routes.entry((endpoint.scope, endpoint.method)).or_default();
            for segment in endpoint.path.split('/') {
                node = match parameter(segment) {
                    Some((before, _)) => node.parameters.entry(before.to_owned()).or_default(),
                    None => node.literal.entry(segment.to_owned()).or_default(),
                };
            }
            node.endpoint = Some(index);
            if let (Some(scope), false) = (endpoint.scope, endpoint.path.contains('{')) {
                literals.insert((scope.host(), normalized(&endpoint.path)), index);
            }
        }
        Self {
            endpoints,
            by_id,
            routes,
            literals,
        }
    }

    /// All endpoints.
    pub(crate) fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// The endpoint with this id.
    pub fn by_id(&self, id: &str) -> Option<&Endpoint> {
        self.by_id
            .get(id)
            .and_then(|&index| self.endpoints.get(index))
    }

    /// The endpoint at this position.
    pub(crate) fn by_number(&self, number: u16) -> Option<&Endpoint> {
        self.endpoints.get(usize::from(number))
    }

    /// The endpoint for `path`. A literal path of any method on the host never matches a template: `cancelAll` is not an order id.
    pub(crate) fn find(&self, scope: Scope, method: Method, path: &str) -> Found<'_> {
        if let Some(endpoint) = self.route(Some(scope), method, path) {
            return self
                .literal_conflict(scope, endpoint, path)
                .unwrap_or(Found::Endpoint(endpoint));
        }
        let elsewhere = Scope::ALL
            .map(Some)
            .into_iter()
            .chain([None])
            .filter(|other| *other != Some(scope));
        let route = |other| Some((other, self.route(other, method, path)?));
        match elsewhere.into_iter().find_map(route) {
            Some((other, endpoint)) => other
                .and_then(|other| self.literal_conflict(other, endpoint, path))
                .unwrap_or(Found::OtherScope(endpoint)),
            None => Found::Unlisted,
        }
    }

    /// The result for a `path` that matches the template of `endpoint`, but is or resembles a literal path of the same host.
    fn literal_conflict(&self, scope: Scope, endpoint: &Endpoint, path: &str) -> Option<Found<'_>> {
        if !endpoint.path.contains('{') {
            return None;
        }
        let index = self.literals.get(&(scope.host(), normalized(path)))?;
        let literal = self.endpoints.get(*index)?;
        Some(if literal.path == path {
            Found::NotAnId(literal)
        } else {
            Found::Lookalike(literal)
        })
    }

    /// The endpoint for exactly this path in `scope`, without the check for look-alikes.
    pub(crate) fn route(
        &self,
        scope: Option<Scope>,
        method: Method,
        path: &str,
    ) -> Option<&Endpoint> {
        let segments: Vec<&str> = path.split('/').collect();
        let index = self.routes.get(&(scope, method))?.find(&segments)?;
        self.endpoints.get(index)
    }
}

/// A path as a lax router reads it: case-insensitive, and without a suffix after a dot in a segment.
fn normalized(path: &str) -> String {
    let stems = path
        .split('/')
        .map(|segment| segment.split('.').next().unwrap_or_default());
    stems.collect::<Vec<_>>().join("/").to_ascii_lowercase()
}

impl Node {
    fn find(&self, segments: &[&str]) -> Option<usize> {
        let Some((segment, rest)) = segments.split_first() else {
            return self.endpoint;
        };
        let literal = self.literal.get(*segment).and_then(|node| node.find(rest));
        let fits = |before: &str| {
            segment
                .strip_prefix(before)
                .is_some_and(|value| !value.is_empty())
        };
        literal.or_else(|| {
            // In reverse: of two prefixes that both match, the longer one comes first.
            let mut fitting = self
                .parameters
                .iter()
                .rev()
                .filter(|(before, _)| fits(before));
            fitting.find_map(|(_, node)| node.find(rest))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::Value;

    use super::super::{RequestLimits, Target, request};
    use super::*;
    use crate::base::ids::RequestId;

    fn found(scope: Scope, method: Method, path: &str) -> String {
        match Catalog::get().find(scope, method, path) {
            Found::Endpoint(endpoint) => endpoint.path.clone(),
            Found::Lookalike(endpoint) => format!("like {}", endpoint.path),
            Found::NotAnId(endpoint) => format!("of {}", endpoint.id),
            Found::OtherScope(endpoint) => format!("other {:?}", endpoint.scope),
            Found::Unlisted => "unlisted".to_owned(),
        }
    }

    #[test]
    fn catalogue_has_all_endpoints_with_unique_ids() {
        let endpoints = Catalog::get().endpoints();
        assert_eq!(endpoints.len(), 584);
        assert_eq!(Catalog::get().by_id.len(), 584, "ids are unique");
        let grantable = |e: &&Endpoint| e.scope.is_some() && e.is_private() && e.grantable;
        assert_eq!(endpoints.iter().filter(grantable).count(), 429);
    }

    #[test]
    fn every_field_of_the_catalogue_has_a_reader() {
        fn names(value: &Value, found: &mut BTreeSet<String>) {
            for (name, value) in value.as_object().into_iter().flatten() {
                found.insert(name.clone());
                names(value, found);
            }
        }
        let endpoints: Vec<Value> = serde_json::from_str(ENDPOINTS).unwrap();
        let mut found = BTreeSet::new();
        for one in &endpoints {
            names(one, &mut found);
        }
        // The broker reads these.
        let broker = "id method path product scope permission risk effect idempotent grantable readsOtherAccounts status \
                      successCodes order clientOid in pointer required requiredWhen items fields answer orderId perItem array ok \
                      field value code msg match lookup lookupByOrderId endpoint needs fixed state";
        // Names of values in orders: the broker reads them by the lists `fields`, `needs` and `fixed`.
        let of_orders = "allowMaxTimeWindow autoBorrow cancelSize clientTimestamp closeOrder fromCurrency fromCurrencySize \
                         funds leverage limitPrice price qty quoteId reduceOnly side size sizeUnit stop stopPrice symbol \
                         toCurrency toCurrencySize tradeType type valueQty";
        // For readers: where the others come from.
        let sources = "basis";
        // The simulated exchange and its tests read these.
        let simulated = "host rateLimitPool weight weightAssumed orderIds cancelByClientOid";
        let read = [broker, of_orders, sources, simulated]
            .into_iter()
            .flat_map(str::split_whitespace);
        assert_eq!(found, read.map(str::to_owned).collect());
    }

    #[test]
    fn every_endpoint_is_found_by_its_own_path() {
        for endpoint in Catalog::get().endpoints() {
            let Some(scope) = endpoint.scope else {
                continue;
            };
            assert_eq!(
                found(scope, endpoint.method, &endpoint.path),
                endpoint.path,
                "{}",
                endpoint.id
            );
        }
    }

    #[test]
    fn literal_paths_match_before_templates() {
        let delete = |path: &str| found(Scope::SpotMargin, Method::Delete, path);
        assert_eq!(
            delete("/api/v1/hf/orders/67fe"),
            "/api/v1/hf/orders/{orderId}"
        );
        assert_eq!(
            delete("/api/v1/hf/orders/cancelAll"),
            "/api/v1/hf/orders/cancelAll"
        );
        assert_eq!(
            delete("/api/v1/hf/orders/CANCELALL"),
            "like /api/v1/hf/orders/cancelAll"
        );
        assert_eq!(
            delete("/api/v1/hf/orders/cancelAll.json"),
            "like /api/v1/hf/orders/cancelAll"
        );
        assert_eq!(
            delete("/api/v1/stop-order/cancel"),
            "/api/v1/stop-order/cancel"
        );
        assert_eq!(
            found(
                Scope::Futures,
                Method::Delete,
                "/api/v1/orders/multi-cancel"
            ),
            "/api/v1/orders/multi-cancel"
        );
    }

    #[test]
    fn literal_path_of_any_method_on_the_host_is_never_an_id() {
        for (scope, method, path, expected) in [
            (
                Scope::Futures,
                Method::Delete,
                "/api/v1/orders/multi",
                "of futures.post.v1-orders-multi",
            ),
            (
                Scope::Futures,
                Method::Delete,
                "/api/v1/orders/Multi",
                "like /api/v1/orders/multi",
            ),
            (
                Scope::SpotMargin,
                Method::Get,
                "/api/v1/hf/orders/cancelall.x",
                "like /api/v1/hf/orders/cancelAll",
            ),
            // Not a literal path of the futures host.
            (
                Scope::Futures,
                Method::Delete,
                "/api/v1/orders/active",
                "/api/v1/orders/{orderId}",
            ),
        ] {
            assert_eq!(found(scope, method, path), expected, "{method} {path}");
        }
        // In all of the catalogue, no template matches a literal path of the same host.
        let all = Catalog::get().endpoints();
        let is_literal = |endpoint: &&Endpoint| !endpoint.path.contains('{');
        let mut tried = 0;
        for literal in all.iter().filter(is_literal) {
            let Some(host) = literal.scope.map(Scope::host) else {
                continue;
            };
            for scope in Scope::ALL.into_iter().filter(|scope| scope.host() == host) {
                for method in [Method::Delete, Method::Get, Method::Post] {
                    for path in [literal.path.clone(), format!("{}.json", literal.path)] {
                        tried += 1;
                        if let Found::Endpoint(endpoint) | Found::OtherScope(endpoint) =
                            Catalog::get().find(scope, method, &path)
                        {
                            assert_eq!(endpoint.path, path, "{method} as {scope}");
                        }
                    }
                }
            }
        }
        assert!(tried > 5000, "{tried}");
    }

    #[test]
    fn undocumented_endpoints_belong_to_no_class() {
        let undocumented: Vec<_> = Catalog::get()
            .endpoints()
            .iter()
            .filter(|endpoint| endpoint.status == Status::Undocumented)
            .collect();
        assert_eq!(undocumented.len(), 12);
        for endpoint in undocumented {
            assert!(endpoint.path.starts_with("/api/ua/v1/classic/"));
            assert_eq!(endpoint.class(), None, "{}", endpoint.id);
        }
        let class = |id: &str| Catalog::get().by_id(id).unwrap().class();
        assert_eq!(class("spot.post.v1-hf-orders"), Some(Risk::Trade));
        assert_eq!(class("spot.get.v1-accounts"), Some(Risk::Read));
        assert_eq!(class("spot.post.v3-withdrawals"), None);
    }

    #[test]
    fn endpoints_whose_orders_cannot_be_looked_up_belong_to_no_class() {
        let endpoints = Catalog::get().endpoints().iter();
        let found = endpoints.filter(|endpoint| endpoint.lacks_lookup());
        let found: Vec<_> = found.map(|e| (e.id.as_str(), e.class())).collect();
        let expected = [
            "futures.post.v1-copy-trade-futures-orders",
            "futures.post.v1-copy-trade-futures-st-orders",
            "futures.post.v2-order",
            "spot.post.ua-v1-account-mode-order-place-batch",
        ];
        assert_eq!(found, expected.map(|id| (id, None)));
    }

    #[test]
    fn parameter_may_be_the_end_of_a_segment() {
        let get = |scope, path: &str| found(scope, Method::Get, path);
        let spot = |path: &str| get(Scope::SpotMargin, path);
        assert_eq!(
            get(Scope::Futures, "/api/v1/level2/depth20"),
            "/api/v1/level2/depth{size}"
        );
        assert_eq!(get(Scope::Futures, "/api/v1/level2/depth"), "unlisted");
        assert_eq!(get(Scope::Futures, "/api/v1/level2/20depth"), "unlisted");
        assert_eq!(
            spot("/api/v1/market/orderbook/level2_100"),
            "/api/v1/market/orderbook/level2_{size}"
        );
        assert_eq!(
            spot("/api/v3/market/orderbook/level4"),
            "/api/v3/market/orderbook/level{level}"
        );
        assert_eq!(
            spot("/api/v3/market/orderbook/level2"),
            "/api/v3/market/orderbook/level2"
        );
        let depth = Catalog::get()
            .by_id("futures.get.v1-level2-depth-size")
            .unwrap();
        assert_eq!(
            depth.path_parameter("size", "/api/v1/level2/depth20"),
            Some("20")
        );
    }

    #[test]
    fn path_of_another_scope_is_reported_as_such() {
        assert_eq!(
            found(Scope::Futures, Method::Post, "/api/v1/hf/orders"),
            "other Some(SpotMargin)"
        );
        assert_eq!(
            found(Scope::SpotMargin, Method::Get, "/api/v1/broker/nd/info"),
            "other None"
        );
        assert_eq!(
            found(Scope::SpotMargin, Method::Get, "/api/v9/nothing"),
            "unlisted"
        );
    }

    #[test]
    fn everything_but_cancels_order_tests_and_reads_is_risk_increasing() {
        let increases = |id: &str| Catalog::get().by_id(id).unwrap().increases_risk();
        assert!(increases("spot.post.v1-hf-orders"));
        assert!(!increases("spot.post.v1-hf-orders-test"));
        assert!(!increases("spot.delete.v1-hf-orders-order-id"));
        assert!(!increases("spot.get.v1-accounts"));
    }

    fn is_foreign_answer(id: &str, target: &str, body: &'static str, answer: &str) -> bool {
        let endpoint = Catalog::get().by_id(id).unwrap();
        let limits = RequestLimits::default();
        let scope = endpoint.scope.unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let query = query.split_once('=');
        let query = query.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let body_client_oids = request::body(
            Some(endpoint),
            endpoint.scope,
            endpoint.method,
            path,
            body.as_bytes(),
            &limits,
        );
        let request = UnsignedRequest {
            account: "main".parse().unwrap(),
            scope,
            method: endpoint.method,
            target: Target::new(path, query.into_iter().collect()).unwrap(),
            body: body.into(),
            id: RequestId::random(),
            body_client_oids: body_client_oids.unwrap(),
        };
        endpoint.has_foreign_client_oid(&request, answer.as_bytes())
    }

    #[test]
    fn answer_to_another_request_is_detected_by_its_client_oids() {
        let (place, path) = ("spot.post.v1-hf-orders", "/api/v1/hf/orders");
        let order = r#"{"clientOid":"a"}"#;
        let named = |oid: &str| {
            format!(r#"{{"code":"200000","data":{{"orderId":"1","clientOid":{oid}}}}}"#)
        };
        for (oid, expected) in [
            ("\"a\"", false),
            ("\"b\"", true),
            ("\"\"", false),
            ("null", false),
            ("7", false),
        ] {
            assert_eq!(
                is_foreign_answer(place, path, order, &named(oid)),
                expected,
                "{oid}"
            );
        }
        assert!(
            !is_foreign_answer(place, path, "{}", &named("\"b\"")),
            "the exchange chose the clientOid"
        );
        assert!(!is_foreign_answer(place, path, order, "<html>"));
        let amended = is_foreign_answer(
            "spot.post.v1-hf-orders-alter",
            "/api/v1/hf/orders/alter",
            order,
            &named("\"b\""),
        );
        assert!(!amended, "not documented");
        let cancel = "futures.delete.v1-orders-client-order-client-oid";
        let path = "/api/v1/orders/client-order/a";
        assert!(is_foreign_answer(cancel, path, "", &named("\"b\"")));
        assert!(!is_foreign_answer(cancel, path, "", &named("\"a\"")));
        let (cancel, path) = (
            "spot.delete.v1-stop-order-cancel-order-by-client-oid",
            "/api/v1/stop-order/cancelOrderByClientOid?clientOid=a",
        );
        assert!(is_foreign_answer(cancel, path, "", &named("\"b\"")));
        let (cancel, path) = (
            "spot.post.ua-v2-unified-order-cancel",
            "/api/ua/v2/unified/order/cancel",
        );
        assert!(is_foreign_answer(cancel, path, order, &named("\"b\"")));
        let by_id = r#"{"clientOid":"a","orderId":"1"}"#;
        assert!(
            !is_foreign_answer(cancel, path, by_id, &named("\"b\"")),
            "the order id counts"
        );
        let (batch, path) = ("futures.post.v1-orders-multi", "/api/v1/orders/multi");
        let orders = r#"[{"clientOid":"a"},{"clientOid":"b"}]"#;
        let items = |second: &str| {
            format!(
                r#"{{"code":"200000","data":[{{"clientOid":"a"}},{{"clientOid":"{second}"}}]}}"#
            )
        };
        assert!(!is_foreign_answer(batch, path, orders, &items("b")));
        assert!(is_foreign_answer(batch, path, orders, &items("c")));
    }

    #[test]
    fn order_without_a_client_oid_may_get_one_from_the_exchange() {
        let items = |second: &str| {
            format!(r#"{{"data":[{{"clientOid":"a"}},{{"clientOid":"{second}"}}]}}"#)
        };
        let (batch, path) = ("futures.post.v1-orders-multi", "/api/v1/orders/multi");
        let orders = r#"[{"clientOid":"a"},{"clientOid":null}]"#;
        assert!(
            !is_foreign_answer(batch, path, orders, &items("made-by-kucoin")),
            "the second order had no clientOid"
        );
        let both = r#"{"data":[{"clientOid":"x"},{"clientOid":"y"}]}"#;
        assert!(
            is_foreign_answer(batch, path, orders, both),
            "only one order had no clientOid"
        );
        let (batch, path) = ("spot.post.v1-hf-orders-multi", "/api/v1/hf/orders/multi");
        let orders = r#"{"orderList":[{"clientOid":"a"},{}]}"#;
        assert!(!is_foreign_answer(
            batch,
            path,
            orders,
            &items("made-by-kucoin")
        ));
        let orders = r#"{"orderList":[{"clientOid":"a"}]}"#;
        assert!(is_foreign_answer(
            batch,
            path,
            orders,
            &items("made-by-kucoin")
        ));
    }

    #[test]
    fn path_parameter_is_read_by_name() {
        let endpoint = Catalog::get()
            .by_id("spot.delete.v1-hf-orders-order-id")
            .unwrap();
        assert_eq!(
            endpoint.path_parameter("orderId", "/api/v1/hf/orders/67fe"),
            Some("67fe")
        );
        assert_eq!(
            endpoint.path_parameter("clientOid", "/api/v1/hf/orders/67fe"),
            None
        );
    }
}
