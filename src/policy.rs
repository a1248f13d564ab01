//! The rules: which bot may send which request. Pure: rules and request in, [`Permit`] or [`Denied`] out.
//!
//! Deny by default. Nothing here counts requests, waits, or reads the body of a request.

pub(crate) mod explain;
pub(crate) mod file;
pub mod listing;
pub(crate) mod warnings;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use crate::base::ids::{AccountId, BotId, KeyName, Principal};
use crate::kucoin::catalog::Found;
use crate::kucoin::{
    Catalog, Effect, Endpoint, Host, Method, Partner, Product, Risk, Scope, Site, UnsignedRequest,
};

/// An account of the rules file.
#[derive(Debug)]
pub struct Account {
    /// Its name.
    pub(crate) id: AccountId,
    /// Its KuCoin site.
    pub(crate) site: Site,
    /// Its VIP level, 0 to 12, which sets its quotas.
    pub(crate) vip: u8,
    /// KuCoin's id of its master account, if both share the quotas of the unified account.
    pub(crate) parent_uid: Option<String>,
    /// What its keys may be used for.
    pub(crate) purpose: Purpose,
    /// Whether endpoints that move money may be granted at all.
    pub(crate) allow_money_out: bool,
    /// The key that signs, per scope.
    pub(crate) keys: BTreeMap<Scope, KeyName>,
    /// The partner (rebate programme), per scope.
    pub(crate) partners: BTreeMap<Scope, Partner>,
    /// How long its cached keys stay in use while Vault is unreachable.
    pub(crate) max_stale: MaxStale,
}

/// How long a cached key stays in use after Vault last confirmed it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct MaxStale {
    /// For risk-increasing requests.
    pub(crate) risk_increasing: Duration,
    /// For cancels and reads, so that open orders can be cancelled while Vault is down; after that the key is wiped.
    pub(crate) cancels_and_reads: Duration,
}

/// What an account's keys may be used for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Purpose {
    /// Reads and public data only.
    ReadOnly,
    /// All that the grants allow.
    #[default]
    Trade,
}

impl Purpose {
    /// Its name in the rules file.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::ReadOnly => "read-only",
            Self::Trade => "trade",
        }
    }
}

/// The parsed rules.
#[derive(Debug, Default)]
pub struct Policy {
    accounts: BTreeMap<AccountId, Arc<Account>>,
    /// The line of each account in the rules file, kept apart so that a moved line does not change the account.
    account_lines: BTreeMap<AccountId, usize>,
    bots: HashMap<BotId, HashMap<AccountId, HashMap<Scope, Grants>>>,
    /// The settings of bots that have some.
    settings: HashMap<BotId, BotSettings>,
}

/// What one bot may do on one account in one scope. No list of rules in a map is empty.
#[derive(Debug, Default)]
struct Grants {
    classes: HashMap<Risk, Vec<Rule>>,
    endpoints: HashMap<&'static str, Vec<Rule>>,
    unlisted: HashMap<(Method, String), Vec<Rule>>,
    /// Grants with `allow = []`.
    idle: Vec<Rule>,
}

/// One entry of a grant, with its line.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Rule {
    /// Its line in the rules file, from 1.
    pub line: usize,
    /// Its key, such as `grant[2].allow[1]`.
    pub(crate) key: String,
    /// A class, the id of an endpoint, or the path of an endpoint that is not in the catalogue.
    pub word: String,
    /// How its requests are treated.
    pub(crate) options: GrantOptions,
}

/// The settings of a bot, on all accounts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BotSettings {
    /// Its weight among the bots of an account, when they share rate limits.
    pub(crate) weight: u32,
    /// The requests that it may send per second, except cancels; `None`: no limit of its own.
    pub(crate) requests_per_s: Option<u32>,
    /// Its calls in flight; `None`: `limits.calls_in_flight_per_bot`.
    pub(crate) calls_in_flight: Option<usize>,
}

impl Default for BotSettings {
    fn default() -> Self {
        Self {
            weight: 1,
            requests_per_s: None,
            calls_in_flight: None,
        }
    }
}

/// The options of a grant.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) struct GrantOptions {
    /// Whether orders need a clientOid.
    pub(crate) client_oid: ClientOidRule,
    /// How long a request waits for its part of a rate budget.
    pub(crate) max_wait: Duration,
}

impl Default for GrantOptions {
    fn default() -> Self {
        Self {
            client_oid: ClientOidRule::default(),
            max_wait: Duration::from_millis(200),
        }
    }
}

/// `client_oid` of a grant: whether orders need a clientOid where the exchange does not require one.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Ord, PartialEq, PartialOrd)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ClientOidRule {
    /// Orders without one are sent, although they can be neither looked up nor recognized when they are repeated.
    Optional,
    /// Orders without one are refused.
    #[default]
    Required,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {:?}", self.key, self.word)
    }
}

/// The rules that allow a request: first those that grant its class, then those that grant its endpoint.
type By<'p> = [&'p [Rule]; 2];

/// An allowed request, before it becomes a [`Permit`] or an explanation.
struct Granted<'p> {
    account: &'p Arc<Account>,
    endpoint: Option<&'static Endpoint>,
    by: By<'p>,
}

/// Proof that the rules allow one request. Only [`Policy::authorize`] makes one; the keyring requires it to hand out a key.
#[derive(Clone, Debug)]
pub struct Permit {
    account: Arc<Account>,
    scope: Scope,
    endpoint: Option<&'static Endpoint>,
    options: GrantOptions,
    of_bot: BotSettings,
    passes_like_a_cancel: bool,
}

impl Permit {
    /// The account.
    pub(crate) fn account(&self) -> &Account {
        &self.account
    }

    /// The scope.
    pub(crate) fn scope(&self) -> Scope {
        self.scope
    }

    /// The site and host that the request goes to.
    pub(crate) fn destination(&self) -> (Site, Host) {
        (self.account.site, self.scope.host())
    }

    /// The catalogue's name of the endpoint, or `unlisted`.
    pub(crate) fn endpoint_id(&self) -> &'static str {
        self.endpoint
            .map_or("unlisted", |endpoint| endpoint.id.as_str())
    }

    /// The endpoint; `None` if it is not in the catalogue.
    pub fn endpoint(&self) -> Option<&'static Endpoint> {
        self.endpoint
    }

    /// The account's key in this scope, if it has one. Public requests are not signed with it.
    pub(crate) fn key_name(&self) -> Option<&KeyName> {
        self.account.keys.get(&self.scope)
    }

    /// The partner whose headers are added to a signed request.
    pub(crate) fn partner(&self) -> Option<&Partner> {
        self.account.partners.get(&self.scope)
    }

    /// Whether the request needs a signature.
    pub fn is_private(&self) -> bool {
        self.endpoint.is_none_or(Endpoint::is_private)
    }

    /// Whether the request is risk-increasing; requests to endpoints that are not in the catalogue are.
    pub(crate) fn increases_risk(&self) -> bool {
        !self.passes_like_a_cancel && self.endpoint.is_none_or(Endpoint::increases_risk)
    }

    /// Treats this request like a cancel, although its endpoint is risk-increasing.
    pub(crate) fn pass_like_a_cancel(&mut self) {
        self.passes_like_a_cancel = true;
    }

    /// Whether an order needs a clientOid where the exchange does not require one.
    pub(crate) fn requires_client_oid(&self) -> bool {
        self.options.client_oid == ClientOidRule::Required
    }

    /// How long the request waits for its part of a rate budget.
    pub(crate) fn max_wait(&self) -> Duration {
        self.options.max_wait
    }

    /// The weight of the bot among the bots of the account.
    pub(crate) fn weight(&self) -> u32 {
        self.of_bot.weight
    }

    /// The requests that the bot may send per second, if the rules limit them.
    pub(crate) fn requests_per_s(&self) -> Option<u32> {
        self.of_bot.requests_per_s
    }

    /// Whether the request can be repeated without harm even if it was executed.
    pub(crate) fn is_idempotent(&self) -> bool {
        self.endpoint.is_some_and(|endpoint| endpoint.idempotent)
    }

    /// Whether the request can change anything on the exchange.
    pub(crate) fn changes(&self) -> bool {
        !self.endpoint.is_some_and(Endpoint::is_read)
    }
}

/// Why the rules do not allow a request.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Denied {
    /// The account is unknown or not granted to this bot; a bot cannot distinguish the two.
    #[error("account {0} is unknown or not granted to this bot")]
    Account(AccountId),
    /// No rule names the bot.
    #[error("no rule names bot {0}; ask an admin for a grant")]
    Caller(BotId),
    /// A lax router could route this path to an endpoint with another path.
    #[error("the path resembles {literal} but is spelled differently; use the exact path")]
    Lookalike {
        /// The path of that endpoint.
        literal: &'static str,
    },
    /// The fixed path of an endpoint with another method or scope; it also matches a template with an id.
    #[error(
        "this is the fixed path of {endpoint} ({method}), so its last segment is not read as an id; check path, method and scope"
    )]
    NotAnId {
        /// The id of the endpoint that has this path.
        endpoint: &'static str,
        /// Its method.
        method: Method,
    },
    /// Endpoints of API keys.
    #[error("{endpoint} creates, changes, returns or deletes API keys and can never be granted")]
    NeverGranted {
        /// The endpoint's id.
        endpoint: &'static str,
    },
    /// No rule grants it.
    #[error("no rule grants {what} to this bot on account {account} in scope {scope}")]
    NotGranted {
        /// The endpoint's id, or method and path.
        what: String,
        /// The account.
        account: AccountId,
        /// The scope of the request.
        scope: Scope,
    },
    /// Admins and the broker itself may not send this.
    #[error(
        "{what} is not permitted for admin or internal calls: internal calls may send only reads and test orders; admin calls may also cancel orders"
    )]
    NotPermittedInternally {
        /// The endpoint's id, or method and path.
        what: String,
    },
    /// The endpoint is on a host that the broker does not support.
    #[error(
        "{endpoint} is on KuCoin's host for exchange brokers, which credbroker does not support"
    )]
    NotServed {
        /// The endpoint's id.
        endpoint: &'static str,
    },
    /// The endpoint belongs to another scope.
    #[error("{endpoint} belongs to scope {belongs}, not to {asked}")]
    Scope {
        /// The endpoint's id.
        endpoint: &'static str,
        /// The scope it belongs to.
        belongs: Scope,
        /// The scope of the request.
        asked: Scope,
    },
    /// The account's site does not have this endpoint.
    #[error("site {site} does not serve {endpoint}")]
    Site {
        /// The site.
        site: Site,
        /// The endpoint's id.
        endpoint: &'static str,
    },
}

impl Policy {
    /// The account of this name.
    pub(crate) fn account(&self, id: &AccountId) -> Option<&Arc<Account>> {
        self.accounts.get(id)
    }

    /// How many bots the rules name.
    pub(crate) fn bots_count(&self) -> usize {
        self.bots.len()
    }

    /// All accounts, sorted by name.
    pub fn accounts(&self) -> impl Iterator<Item = &Arc<Account>> {
        self.accounts.values()
    }

    /// All bots that grants name, in no particular order.
    pub(crate) fn bots(&self) -> impl Iterator<Item = &BotId> {
        self.bots.keys()
    }

    /// Whether a grant names `bot`.
    pub(crate) fn names(&self, bot: &BotId) -> bool {
        self.bots.contains_key(bot)
    }

    /// The site and host of an account in a scope, if any grant of `bot` names both.
    pub(crate) fn host_of(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
    ) -> Option<(Site, Host)> {
        self.bots.get(bot)?.get(account)?.get(&scope)?;
        Some((self.accounts.get(account)?.site, scope.host()))
    }

    /// The hosts that accounts have keys for. Signing needs their time.
    pub(crate) fn hosts(&self) -> BTreeSet<(Site, Host)> {
        let of_account = |account: &Arc<Account>| {
            let site = account.site;
            let scopes: Vec<_> = account.keys.keys().copied().collect();
            scopes.into_iter().map(move |scope| (site, scope.host()))
        };
        self.accounts().flat_map(of_account).collect()
    }

    /// Allows or denies `request`. A bot may send what the rules grant it. On any account of the rules, an admin may send
    /// all that is not risk-increasing; so may the broker itself, except cancels.
    pub fn authorize(
        &self,
        principal: &Principal,
        request: &UnsignedRequest,
    ) -> Result<Permit, Denied> {
        let &UnsignedRequest {
            scope,
            method,
            ref account,
            ref target,
            ..
        } = request;
        let (mut options, mut of_bot) = (GrantOptions::default(), BotSettings::default());
        let (entry, endpoint) = match principal {
            Principal::Bot(bot) => {
                let granted = self.decide(bot, account, scope, method, target.path())?;
                options = most_generous(granted.by);
                of_bot = self.settings(bot);
                (granted.account, granted.endpoint)
            }
            Principal::Admin(_) => {
                self.decide_own(request, |endpoint| !endpoint.increases_risk())?
            }
            Principal::Broker => self.decide_own(request, |endpoint| {
                !endpoint.increases_risk()
                    && !matches!(endpoint.effect, Effect::Cancel | Effect::CancelAll)
            })?,
        };
        Ok(Permit {
            account: Arc::clone(entry),
            scope,
            endpoint,
            options,
            of_bot,
            passes_like_a_cancel: false,
        })
    }

    /// The settings of a bot.
    pub(crate) fn settings(&self, bot: &BotId) -> BotSettings {
        self.settings.get(bot).copied().unwrap_or_default()
    }

    /// Checks that a rule grants this bot anything on the account.
    ///
    /// # Errors
    /// When none does.
    pub(crate) fn check_account(&self, bot: &BotId, account: &AccountId) -> Result<(), Denied> {
        self.grants(bot, account, Scope::SpotMargin).map(drop)
    }

    /// The account, if a rule grants this bot the class `read` on it in this scope.
    ///
    /// # Errors
    /// When none does.
    pub(crate) fn check_read(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
    ) -> Result<&Arc<Account>, Denied> {
        let (entry, grants) = self.grants(bot, account, scope)?;
        match grants.and_then(|grants| grants.classes.get(&Risk::Read)) {
            Some(_) => Ok(entry),
            None => Err(Denied::NotGranted {
                what: format!("class {:?}", Risk::Read.as_str()),
                account: account.clone(),
                scope,
            }),
        }
    }

    /// Allows or denies a request of an admin or of the broker itself.
    fn decide_own(
        &self,
        request: &UnsignedRequest,
        may: impl Fn(&Endpoint) -> bool,
    ) -> Result<(&Arc<Account>, Option<&'static Endpoint>), Denied> {
        let (scope, method, path) = (request.scope, request.method, request.target.path());
        let account = self.accounts.get(&request.account);
        let account = account.ok_or_else(|| Denied::Account(request.account.clone()))?;
        match Catalog::get().find(scope, method, path) {
            Found::Endpoint(endpoint) if may(endpoint) && serves(account.site, endpoint) => {
                Ok((account, Some(endpoint)))
            }
            Found::Endpoint(endpoint) => Err(Denied::NotPermittedInternally {
                what: endpoint.id.clone(),
            }),
            _ => Err(Denied::NotPermittedInternally {
                what: format!("{method} {path}"),
            }),
        }
    }

    /// Allows or denies a bot's request. [`explain`] uses it too, so that both agree.
    fn decide(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
        method: Method,
        path: &str,
    ) -> Result<Granted<'_>, Denied> {
        let (entry, grants) = self.grants(bot, account, scope)?;
        let not_granted = |what: String| Denied::NotGranted {
            what,
            account: account.clone(),
            scope,
        };
        let endpoint = match Catalog::get().find(scope, method, path) {
            Found::Endpoint(endpoint) => endpoint,
            Found::Lookalike(literal) => {
                return Err(Denied::Lookalike {
                    literal: &literal.path,
                });
            }
            Found::NotAnId(endpoint) => {
                return Err(Denied::NotAnId {
                    endpoint: &endpoint.id,
                    method: endpoint.method,
                });
            }
            Found::OtherScope(endpoint) => {
                let name = endpoint.id.as_str();
                return Err(match endpoint.scope {
                    Some(belongs) => Denied::Scope {
                        endpoint: name,
                        belongs,
                        asked: scope,
                    },
                    None => Denied::NotServed { endpoint: name },
                });
            }
            Found::Unlisted => {
                let by = grants.and_then(|grants| grants.unlisted(method, path));
                return match by {
                    Some(rules) => Ok(Granted {
                        account: entry,
                        endpoint: None,
                        by: [&[], rules],
                    }),
                    None => Err(not_granted(format!(
                        "{method} on this path (not in the catalogue)"
                    ))),
                };
            }
        };
        match allowed_by(entry, grants, endpoint)? {
            [[], []] => Err(not_granted(endpoint.id.clone())),
            by => Ok(Granted {
                account: entry,
                endpoint: Some(endpoint),
                by,
            }),
        }
    }

    /// The account, and what the bot may do there. An account without a grant for this bot looks like an unknown one.
    fn grants(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
    ) -> Result<(&Arc<Account>, Option<&Grants>), Denied> {
        let granted_accounts = self
            .bots
            .get(bot)
            .ok_or_else(|| Denied::Caller(bot.clone()))?;
        match (granted_accounts.get(account), self.accounts.get(account)) {
            (Some(grants), Some(entry)) => Ok((entry, grants.get(&scope))),
            _ => Err(Denied::Account(account.clone())),
        }
    }

    /// Whether `bot` may call `endpoint` with any path parameters.
    fn may(
        &self,
        bot: &BotId,
        account: &AccountId,
        scope: Scope,
        endpoint: &'static Endpoint,
    ) -> bool {
        let by = self
            .grants(bot, account, scope)
            .and_then(|(entry, grants)| allowed_by(entry, grants, endpoint));
        endpoint.scope == Some(scope) && !matches!(by, Ok([[], []]) | Err(_))
    }

    /// Every combination of bot, account and scope that a grant names, sorted.
    fn granted(&self) -> BTreeMap<(&BotId, &AccountId, Scope), &Grants> {
        let mut all = BTreeMap::new();
        for (bot, accounts) in &self.bots {
            for (account, scopes) in accounts {
                let grants = scopes.iter();
                all.extend(grants.map(|(&scope, grants)| ((bot, account, scope), grants)));
            }
        }
        all
    }
}

/// The rules that allow an endpoint. An error if it can never be granted or the account's site does not have it.
fn allowed_by<'p>(
    account: &Account,
    grants: Option<&'p Grants>,
    endpoint: &'static Endpoint,
) -> Result<By<'p>, Denied> {
    if !endpoint.grantable {
        return Err(Denied::NeverGranted {
            endpoint: &endpoint.id,
        });
    }
    if !serves(account.site, endpoint) {
        return Err(Denied::Site {
            site: account.site,
            endpoint: &endpoint.id,
        });
    }
    Ok(grants.map_or([&[], &[]], |grants| grants.by(endpoint)))
}

/// The most generous options of these rules.
fn most_generous(by: By<'_>) -> GrantOptions {
    let options = by.into_iter().flatten().map(|rule| rule.options);
    let options = options.reduce(|most, other| GrantOptions {
        client_oid: most.client_oid.min(other.client_oid),
        max_wait: most.max_wait.max(other.max_wait),
    });
    options.unwrap_or_default()
}

impl Grants {
    fn by(&self, endpoint: &Endpoint) -> By<'_> {
        let class = endpoint.class().and_then(|class| self.classes.get(&class));
        let name = self.endpoints.get(endpoint.id.as_str());
        [class, name].map(|rules| rules.map_or(&[][..], Vec::as_slice))
    }

    fn unlisted(&self, method: Method, path: &str) -> Option<&[Rule]> {
        // Few installations have any: return before the lookup, which allocates.
        if self.unlisted.is_empty() {
            return None;
        }
        let rules = self.unlisted.get(&(method, path.to_owned()))?;
        Some(rules)
    }

    /// The longest `max_wait_ms` of its rules, if one differs from the default.
    fn max_wait(&self) -> Option<Duration> {
        let waits = || self.rules().into_iter().map(|rule| rule.options.max_wait);
        let default = GrantOptions::default().max_wait;
        waits()
            .max()
            .filter(|_| waits().any(|wait| wait != default))
    }

    /// All rules except those of `allow = []`, in the order of the file.
    fn rules(&self) -> Vec<&Rule> {
        let listed = self.classes.values().chain(self.endpoints.values());
        let mut rules: Vec<_> = listed.chain(self.unlisted.values()).flatten().collect();
        rules.sort_unstable();
        rules
    }
}

/// Whether a site has an endpoint. Source for site `tr`, which has no margin: KuCoin's Turkish documentation (spot only).
fn serves(site: Site, endpoint: &Endpoint) -> bool {
    endpoint.scope.is_some_and(|scope| site.serves(scope))
        && !(site == Site::Tr && endpoint.product == Product::Margin)
}
