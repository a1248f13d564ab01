//! What KuCoin's error codes mean and how to fix them: the texts that bots, admins and documents get.
//!
//! Sources: KuCoin API documentation, "Error Code" (HTTP, gateway, spot, margin, futures, UTA, WebSocket), and codes that ccxt has
//! seen. The same number means different things in different products, so each code is listed with its scopes.

use std::net::IpAddr;

use http::StatusCode;

use super::broker_query::address_in;
use super::code::{Class, RefusalCode};
use super::{Answer, Endpoint, Scope};
use crate::base::outcome::Outcome;

/// Advice on one kind of error.
#[derive(Debug)]
pub struct Advice {
    /// Stable name, in kebab case.
    pub topic: &'static str,
    /// Codes that mean it, with their scopes; empty if it is detected in another way.
    pub codes: &'static [(&'static [Scope], &'static [&'static str])],
    /// What is wrong, in one sentence.
    pub(crate) meaning: &'static str,
    /// The usual cause.
    pub(crate) cause: &'static str,
    /// What to do; may contain the placeholders [`ADDRESS`] and [`PERMISSION`].
    fix: &'static str,
}

/// Facts about a rejected request that fill the placeholders of a fix.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AdviceContext<'f> {
    /// The address that KuCoin saw, or is expected to see.
    pub(crate) address: Option<IpAddr>,
    /// The address that KuCoin is expected to see: `egress.expected_ip`.
    pub(crate) expected: Option<IpAddr>,
    /// The permission that the request needs, as KuCoin's page names it.
    pub(crate) permission: Option<&'f str>,
}

impl AdviceContext<'_> {
    /// The address that KuCoin saw and the expected one, if they differ.
    fn unexpected(&self) -> Option<(IpAddr, IpAddr)> {
        let (seen, expected) = (self.address?.to_canonical(), self.expected?.to_canonical());
        (seen != expected).then_some((seen, expected))
    }
}

/// What to do about a rejected address that is not the expected one: to whitelist it can be wrong.
pub(crate) fn unexpected_address(seen: IpAddr, expected: IpAddr) -> String {
    format!(
        "Find out which address is right. If it is {expected}, correct the route by which the broker's requests leave, and do not \
         whitelist {seen}. If it is {seen}, set egress.expected_ip to it and add it to the key's addresses under API Management > Edit > \
         IP restriction."
    )
}

/// Topic of a rejected address.
pub(crate) const NOT_WHITELISTED: &str = "address-not-whitelisted";

/// Placeholder for the address in a fix, and the text for an unknown address.
const ADDRESS: (&str, &str) = ("{address}", "the broker's egress address");

/// Placeholder for the permission in a fix, and the text for an unknown permission.
const PERMISSION: (&str, &str) = (
    "{permission}",
    "the permission that KuCoin's documentation names for this request",
);

/// Codes that KuCoin uses for several things: code, part of the message in lower case, topic.
const BY_MESSAGE: [(&str, &str, &str); 9] = [
    ("100001", "not exist", "order-not-found"),
    ("100001", "notexist", "order-not-found"),
    ("400100", "account.available", "funds-missing"),
    ("400100", "insufficient", "funds-missing"),
    ("400100", "not allow to be cancel", "order-not-found"),
    ("400100", "order not exist", "order-not-found"),
    ("400100", "order_not_exist", "order-not-found"),
    ("400200", "forbidden to place", "order-forbidden"),
    ("400200", "partner", "partner-unknown"),
];

/// The topic of a code that is in no table.
const CODE_UNKNOWN: &str = "code-unknown";

/// The topic of an answer that leaves the outcome open for another reason than its code.
const OUTCOME_UNCLEAR: &str = "outcome-unclear";

/// Topics of codes that leave the outcome open.
const UNCLEAR: [&str; 2] = ["stream-ended", "kucoin-failed"];

/// The advice on `code` in `scope` (`None`: any scope); the most likely one if the code has several meanings.
pub(crate) fn of(scope: Option<Scope>, code: &str) -> Option<&'static Advice> {
    meanings(scope, code).next()
}

/// Like [`of`], but chooses by `msg` if the code has several meanings.
pub(crate) fn of_message(scope: Scope, code: &str, msg: &str) -> Option<&'static Advice> {
    let msg = msg.to_ascii_lowercase();
    let row = BY_MESSAGE
        .iter()
        .find(|(overloaded, part, _)| *overloaded == code && msg.contains(part));
    row.map_or_else(|| of(Some(scope), code), |(.., name)| topic(name))
}

/// The advice on this topic.
pub(crate) fn topic(name: &str) -> Option<&'static Advice> {
    ALL.iter().find(|advice| advice.topic == name)
}

/// Every advice on `word`, a code or a topic, in `scope` (`None`: any scope); the most likely first.
pub(crate) fn meanings(scope: Option<Scope>, word: &str) -> impl Iterator<Item = &'static Advice> {
    ALL.iter()
        .filter(move |advice| advice.topic == word || advice.is_of(scope, word))
}

/// The advice that a bot gets with an answer in `scope`; empty if the request was accepted or there is no advice.
/// `egress_ip` is the expected egress address.
pub(crate) fn for_bot(
    answer: &Answer,
    scope: Scope,
    endpoint: Option<&Endpoint>,
    egress_ip: IpAddr,
) -> String {
    if answer.outcome == Outcome::Accepted {
        return String::new();
    }
    // The page that the edge (Cloudflare) returns has no code.
    let code = match answer.code.as_str() {
        "" if answer.http_status == StatusCode::TOO_MANY_REQUESTS => "1015",
        code => code,
    };
    let is_configurable = || {
        let product = endpoint.map(|endpoint| endpoint.product);
        RefusalCode::new(scope.host(), product, code).is_ok()
    };
    // With an open outcome the advice is to look the order up, even if the code alone would mean a rejection.
    let advice = match (answer.outcome, answer.class) {
        (Outcome::MaybeSent, _) if answer.is_of_unknown_code && is_configurable() => {
            topic(CODE_UNKNOWN)
        }
        (Outcome::MaybeSent, Class::Unclear) => {
            meanings(Some(scope), code).find(|advice| UNCLEAR.contains(&advice.topic))
        }
        (Outcome::MaybeSent, _) => topic(OUTCOME_UNCLEAR),
        _ => of_message(scope, code, &answer.msg),
    };
    let Some(advice) = advice else {
        return String::new();
    };
    advice.text(&AdviceContext {
        address: address_in(&answer.msg),
        expected: Some(egress_ip),
        permission: endpoint.and_then(|endpoint| endpoint.permission.as_deref()),
    })
}

impl Advice {
    /// The usual cause, and both addresses if KuCoin saw another one than expected.
    pub(crate) fn cause_with(&self, facts: &AdviceContext) -> String {
        match facts.unexpected() {
            Some((seen, expected)) if self.fix.contains(ADDRESS.0) => {
                format!(
                    "{} KuCoin saw {seen}, not the expected {expected}.",
                    self.cause
                )
            }
            _ => self.cause.to_owned(),
        }
    }

    /// What to do, with the placeholders filled.
    pub(crate) fn fix(&self, facts: &AdviceContext) -> String {
        if let Some((seen, expected)) = facts.unexpected().filter(|_| self.topic == NOT_WHITELISTED)
        {
            return unexpected_address(seen, expected);
        }
        let address = facts.address.map(|address| address.to_string());
        let permission = facts
            .permission
            .map(|name| format!("the permission {name}"));
        let or = |fact: Option<String>, unknown: &str| fact.unwrap_or_else(|| unknown.to_owned());
        self.fix
            .replace(ADDRESS.0, &or(address, ADDRESS.1))
            .replace(PERMISSION.0, &or(permission, PERMISSION.1))
    }

    /// Meaning, cause and fix as one paragraph.
    pub(crate) fn text(&self, facts: &AdviceContext) -> String {
        let (cause, fix) = (self.cause_with(facts), self.fix(facts));
        format!("{} {cause} {fix}", self.meaning)
    }

    /// Whether `code` means this in `scope` (`None`: any scope).
    fn is_of(&self, scope: Option<Scope>, code: &str) -> bool {
        self.codes.iter().any(|(scopes, codes)| {
            scope.is_none_or(|scope| scopes.contains(&scope)) && codes.contains(&code)
        })
    }
}

const EVERY: &[Scope] = &Scope::ALL;
const FUTURES: &[Scope] = &[Scope::Futures];
const NOT_SPOT: &[Scope] = &[Scope::Futures, Scope::Unified];
const SPOT: &[Scope] = &[Scope::SpotMargin];
const SPOT_OR_UNIFIED: &[Scope] = &[Scope::SpotMargin, Scope::Unified];
const UNIFIED: &[Scope] = &[Scope::Unified];

/// All advice: keys first, then accounts, requests, limits, orders, and KuCoin itself. Of two with the same code and scope, the
/// more likely one comes first.
pub static ALL: &[Advice] = &[
    Advice {
        topic: "key-unknown",
        codes: &[(EVERY, &["400003"])],
        meaning: "KuCoin reports that this API key does not exist.",
        cause: "The key was deleted, has expired, or belongs to a different KuCoin site than the account.",
        fix: "Look for the key under API Management on the account's KuCoin site. If it is missing, create a new key there \
              and register it. If it belongs to another site, correct `site` of the account in the rules.",
    },
    Advice {
        topic: "secret-or-passphrase-wrong",
        codes: &[(EVERY, &["400004", "400005"])],
        meaning: "Either the secret or the passphrase of this API key is wrong.",
        cause: "KuCoin verifies the passphrase with the secret, so a wrong secret looks like a wrong passphrase.",
        fix: "Register the key again with the exact secret and passphrase that it was created with; the passphrase is not the \
              trading password. If they are lost, create a new key under API Management.",
    },
    Advice {
        topic: NOT_WHITELISTED,
        codes: &[(EVERY, &["400006"])],
        meaning: "The request's IP address is not whitelisted for this API key.",
        cause: "The key has an IP restriction, and this address is not on its list.",
        fix: "Add {address} to the key's addresses under API Management > Edit > IP restriction.",
    },
    Advice {
        topic: "permission-missing",
        codes: &[(EVERY, &["400007"])],
        meaning: "This API key lacks a permission that the request needs.",
        cause: "The permission is not ticked for the key.",
        fix: "If the key should be allowed to do this, tick {permission} under API Management > Edit > API permissions.",
    },
    Advice {
        topic: "key-too-old",
        codes: &[(EVERY, &["400008"])],
        meaning: "KuCoin no longer accepts API keys of this version for this request.",
        cause: "The key has API key version 1 or 2.",
        fix: "Create a new key under API Management (new keys have version 3) and register it.",
    },
    Advice {
        topic: "key-version-wrong",
        codes: &[(EVERY, &["400009"])],
        meaning: "KuCoin rejected the API key version that was sent.",
        cause: "The API key version (2 or 3) stored with the key is not the one that the key has at KuCoin.",
        fix: "Register the key again; registration detects the API key version, which API Management also shows next to the key.",
    },
    Advice {
        topic: "account-not-allowed",
        codes: &[(EVERY, &["400010"])],
        meaning: "This KuCoin account is not allowed to make this request.",
        cause: "The permission is missing from the account (its UID), not from the key; often the account is a sub-account \
                for which the product is not enabled.",
        fix: "Enable the product for the account on KuCoin's site; for a sub-account, in the master account under \
              Sub-Account. If it is already enabled, contact KuCoin support.",
    },
    Advice {
        topic: "partner-signature-wrong",
        codes: &[(EVERY, &["400201"])],
        meaning: "KuCoin rejected the partner signature.",
        cause: "The `partner_key` stored with the API key does not belong to the partner in the rules.",
        fix: "Register the key again with the correct `partner_key`, or correct the partner's `id` in the rules.",
    },
    Advice {
        topic: "partner-address-refused",
        codes: &[(EVERY, &["400202"])],
        meaning: "The request's IP address is not whitelisted for the partner.",
        cause: "The partner has an IP restriction, and this address is not on its list.",
        fix: "Ask your contact at KuCoin to add {address} to the partner's addresses.",
    },
    Advice {
        topic: "account-frozen",
        codes: &[(EVERY, &["411100"])],
        meaning: "This KuCoin account is frozen.",
        cause: "KuCoin's risk control or the owner froze it.",
        fix: "Stop the bots of this account, and ask KuCoin support why it is frozen.",
    },
    Advice {
        topic: "account-restricted",
        codes: &[
            (SPOT, &["126002", "400444", "400700"]),
            (UNIFIED, &["301100", "301101", "301102", "301103", "301133"]),
        ],
        meaning: "KuCoin has restricted this account.",
        cause: "KuCoin's risk control, or a rule about the owner's region or identity, rejected the request.",
        fix: "Log in on KuCoin's site and follow the instructions there, or contact KuCoin support.",
    },
    Advice {
        topic: "region-restricted",
        codes: &[
            (EVERY, &["400301", "400302"]),
            (FUTURES, &["40010"]),
            (SPOT, &["126021", "126037", "126045", "126046", "400500"]),
        ],
        meaning: "KuCoin does not offer this in the region of the account or of the IP address.",
        cause: "Local law or KuCoin's own rules prohibit it, based on the owner's identity or the location of the IP address.",
        fix: "Check that KuCoin serves the owner's country and the country of {address}; KuCoin support can tell which of \
              them is the cause.",
    },
    Advice {
        topic: "identity-unverified",
        codes: &[
            (EVERY, &["400303", "400304"]),
            (SPOT, &["126005", "126047", "126048", "200009"]),
        ],
        meaning: "KuCoin requires the owner of this account to verify their identity first.",
        cause: "The identity verification (KYC) is missing or its level is too low; for a sub-account, the master account's \
                verification counts.",
        fix: "Complete the identity verification on KuCoin's site, in the master account.",
    },
    Advice {
        topic: "margin-not-enabled",
        codes: &[(SPOT, &["101030", "130306", "130307", "130323"])],
        meaning: "Margin trading is not enabled for this account.",
        cause: "KuCoin's margin agreement has not been accepted in this account.",
        fix: "Log in to the account on KuCoin's site, open margin trading and accept the agreement.",
    },
    Advice {
        topic: "convert-not-enabled",
        codes: &[(SPOT, &["102441"])],
        meaning: "Convert is not enabled for this account.",
        cause: "KuCoin's convert agreement has not been accepted in this account.",
        fix: "Log in to the account on KuCoin's site, open Convert and accept the agreement.",
    },
    Advice {
        topic: "not-a-unified-account",
        codes: &[(UNIFIED, &["112010"])],
        meaning: "This is not a unified account.",
        cause: "The account is in classic mode, but the request is for unified accounts.",
        fix: "Use the scopes spot-margin and futures, or switch the account to unified trading on KuCoin's site.",
    },
    Advice {
        topic: "withdrawal-closed",
        codes: &[(SPOT, &["260210"]), (SPOT_OR_UNIFIED, &["110003"])],
        meaning: "KuCoin does not accept this withdrawal now.",
        cause: "Withdrawals of this currency or from this account are suspended (260210), or the 24-hour limit is used up \
                (110003).",
        fix: "Check the currency and the account's limits on KuCoin's site, or contact KuCoin support.",
    },
    Advice {
        topic: "headers-missing",
        codes: &[(EVERY, &["400001"])],
        meaning: "KuCoin found no API headers on the request, or its path does not exist.",
        cause: "The broker sets the headers itself, so usually the path is wrong.",
        fix: "Compare the path with KuCoin's documentation. If it is correct, report a credbroker bug with the request id.",
    },
    Advice {
        topic: "timestamp-off",
        codes: &[(EVERY, &["400002"])],
        meaning: "KuCoin rejected the timestamp of the request.",
        cause: "It was more than 5 seconds off when the request arrived: the clock is wrong, or the request took too long to \
                arrive.",
        fix: "Send the request again: after this code the broker measures KuCoin's time again. If the code comes back, check \
              the clock of the broker's machine and its connection to KuCoin.",
    },
    Advice {
        topic: "parameter-wrong",
        codes: &[
            (EVERY, &["400100", "400101", "400102"]),
            (SPOT, &["400400"]),
            (FUTURES, &["100001", "100003", "200003", "300000"]),
        ],
        meaning: "KuCoin rejected a value in the request.",
        cause: "A value is missing, misspelled or out of range; `msg` usually says which. KuCoin also returns 400100 for \
                missing funds and for orders that cannot be cancelled.",
        fix: "Correct the request with the help of `msg` and KuCoin's documentation; the symbol's details list the price and \
              size increments.",
    },
    Advice {
        topic: "endpoint-unknown",
        codes: &[(EVERY, &["404", "404000", "405"])],
        meaning: "KuCoin has no endpoint with this path and method.",
        cause: "The path is misspelled, KuCoin has removed the endpoint, or it belongs to another scope.",
        fix: "Compare method, path and scope with KuCoin's documentation.",
    },
    Advice {
        topic: "endpoint-retired",
        codes: &[(EVERY, &["401000"])],
        meaning: "KuCoin has shut down this endpoint.",
        cause: "It is an old endpoint that was replaced by another.",
        fix: "Use the replacement named in KuCoin's documentation or change log.",
    },
    Advice {
        topic: "feature-removed",
        codes: &[(EVERY, &["400413"])],
        meaning: "KuCoin no longer accepts hidden and iceberg orders.",
        cause: "Since August 2026 it rejects orders that have `hidden`, `iceberg` or `visibleSize`.",
        fix: "Remove `hidden`, `iceberg` and `visibleSize` from the order.",
    },
    Advice {
        topic: "media-type-wrong",
        codes: &[(EVERY, &["415000"])],
        meaning: "KuCoin rejected the media type of the body.",
        cause: "It accepts only JSON.",
        fix: "Send JSON in the body of a POST, and no body with a GET. If the request already does, report a credbroker bug \
              with the request id.",
    },
    Advice {
        topic: "url-blocked",
        codes: &[(EVERY, &["411200"])],
        meaning: "KuCoin has blocked this path for this account.",
        cause: "The path is on a blacklist that KuCoin keeps for the account.",
        fix: "Contact KuCoin support and name the path.",
    },
    Advice {
        topic: "login-needed",
        codes: &[(EVERY, &["400401"]), (NOT_SPOT, &["400400"])],
        meaning: "This path requires a login; an API key is not enough.",
        cause: "The path is for KuCoin's website or apps, which log in differently.",
        fix: "Use a path from KuCoin's API documentation.",
    },
    Advice {
        topic: "session-refused",
        codes: &[(EVERY, &["400011", "400012"])],
        meaning: "KuCoin rejected a WebSocket session.",
        cause: "The response to its challenge was wrong (400011) or took longer than about 30 seconds (400012).",
        fix: "If your client opened the session itself, reconnect and respond to the challenge immediately. credbroker opens \
              no such sessions: through the broker, send orders with SignAndSend.",
    },
    Advice {
        topic: "stream-ended",
        codes: &[(EVERY, &["420001", "420002", "501000"])],
        meaning: "KuCoin has closed a WebSocket connection.",
        cause: "A KuCoin server was shut down, or the connection violated a rule or was open for too long.",
        fix: "Reconnect after a moment. If this code came in answer to an order, look the order up by its clientOid before \
              sending it again.",
    },
    Advice {
        topic: "rate-limited",
        codes: &[(EVERY, &["429000"])],
        meaning: "KuCoin temporarily rejects requests of this kind.",
        cause: "The account has used up its quota for them, or KuCoin is overloaded.",
        fix: "Wait for `retry_after_ms` if it is set, otherwise 1 second, and longer after each further rejection; then send \
              fewer requests.",
    },
    Advice {
        topic: "futures-rate-limited",
        codes: &[(FUTURES, &["200002"])],
        meaning: "KuCoin rejects futures requests of this kind for 10 seconds.",
        cause: "Too many were sent in a short time.",
        fix: "Wait 10 seconds, then send fewer requests.",
    },
    Advice {
        topic: "kucoin-overloaded",
        codes: &[(EVERY, &["429001"])],
        meaning: "KuCoin temporarily rejects requests of all customers.",
        cause: "A limit that all customers share was reached.",
        fix: "Wait 1 second, and longer after each further rejection, then send the request again.",
    },
    Advice {
        topic: "connection-limited",
        codes: &[(EVERY, &["429002"])],
        meaning: "KuCoin temporarily rejects requests on this connection.",
        cause: "Too many were sent on it in a short time.",
        fix: "Wait 1 second, then send requests at a lower rate.",
    },
    Advice {
        topic: "edge-blocked",
        codes: &[(EVERY, &["1015"])],
        meaning: "KuCoin's network has blocked the broker's address for about 30 seconds.",
        cause: "The bots together sent too many requests from one address: about 500 in 10 seconds are allowed.",
        fix: "Pause every bot of this broker for 30 seconds, then send fewer requests; get market data from WebSocket \
              streams.",
    },
    Advice {
        topic: "funds-missing",
        codes: &[(
            SPOT,
            &[
                "102421", "115007", "126013", "130105", "130203", "130301", "151009", "200004",
                "210021", "230003", "260100",
            ],
        )],
        meaning: "There are not enough funds for this request in the account that it uses.",
        cause: "Spot orders use only the trading account, margin orders only the margin account; funds held by open orders do \
                not count. Often the funds are still in the main account.",
        fix: "Compare the balances (`GET /api/v1/accounts`). If the funds are in `main`, transfer them on KuCoin's site under \
              Assets > Transfer: to the trading account for spot orders, to the margin account for margin orders. Otherwise \
              send a smaller order.",
    },
    Advice {
        topic: "funds-in-main",
        codes: &[],
        meaning: "The funds are in the main account, not in the trading account.",
        cause: "Deposits arrive in the main account, which KuCoin's site calls Funding Account; spot orders use only the \
                Trading Account.",
        fix: "Transfer the funds on KuCoin's site under Assets > Transfer, from Funding Account to Trading Account.",
    },
    Advice {
        topic: "futures-funds-missing",
        codes: &[(FUTURES, &["200005", "300003", "330008"])],
        meaning: "There are not enough funds in the futures account for this request.",
        cause: "Only the futures account counts, minus funds held by positions and open orders.",
        fix: "Transfer funds to the futures account on KuCoin's site under Assets > Transfer, or send a smaller order.",
    },
    Advice {
        topic: "unified-funds-missing",
        codes: &[(UNIFIED, &["106150", "106212", "301130"])],
        meaning: "There are not enough funds in the unified account for this request.",
        cause: "Funds held by positions, loans and open orders do not count, and neither do funds in the Funding Account.",
        fix: "Transfer funds to the unified account on KuCoin's site under Assets > Transfer, or send a smaller order.",
    },
    Advice {
        topic: "client-oid-repeated",
        codes: &[
            (SPOT, &["102426", "126033", "126044"]),
            (FUTURES, &["300018"]),
            (UNIFIED, &["106151", "106152", "106209"]),
        ],
        meaning: "KuCoin already has an order with this clientOid.",
        cause: "The order was sent before, perhaps by a retry.",
        fix: "Look up the first order by its clientOid: if this request was a repeat of it, the state of that order is the \
              result. For a different order, use a new clientOid.",
    },
    Advice {
        topic: "order-not-found",
        codes: &[
            (EVERY, &["order_not_exist"]),
            (SPOT, &["126043"]),
            (FUTURES, &["100004"]),
            (UNIFIED, &["106052", "106100", "106102"]),
        ],
        meaning: "KuCoin has no such order, or it can no longer be cancelled.",
        cause: "It is already filled or cancelled, its id or symbol is wrong, or it was placed so recently that KuCoin does \
                not list it yet.",
        fix: "Check the id and the symbol. If the order was just placed, it may still appear: repeat the lookup by clientOid for \
              about 15 seconds before you conclude that the order does not exist.",
    },
    Advice {
        topic: "order-limited",
        codes: &[
            (SPOT, &["126011", "200003"]),
            (
                FUTURES,
                &["300001", "300004", "300005", "300011", "300012", "300016"],
            ),
            (UNIFIED, &["106206"]),
        ],
        meaning: "The order exceeds one of KuCoin's limits.",
        cause: "There are too many open orders, or the size, price or position is outside what the symbol or the account's \
                risk limit allows; `msg` usually says which.",
        fix: "Cancel orders that are no longer needed, or change size or price.",
    },
    Advice {
        topic: "symbol-closed",
        codes: &[
            (
                SPOT,
                &[
                    "126004", "126006", "126007", "126008", "126009", "200001", "400600", "600203",
                    "900001",
                ],
            ),
            (FUTURES, &["300002"]),
            (UNIFIED, &["106053", "106054", "106190", "106194"]),
        ],
        meaning: "This symbol cannot be traded now.",
        cause: "It is not open yet, suspended, delisted or misspelled.",
        fix: "Check the symbol in KuCoin's symbol list and announcements. If it is suspended, try again later.",
    },
    Advice {
        topic: "cancel-suspended",
        codes: &[(SPOT, &["126010", "200002"])],
        meaning: "KuCoin does not accept cancels for this symbol now.",
        cause: "Trading of the symbol is suspended, usually for maintenance or delisting.",
        fix: "The order is still open: retry until it is cancelled, and check KuCoin's announcements.",
    },
    Advice {
        topic: "order-forbidden",
        codes: &[(SPOT, &["400200"])],
        meaning: "KuCoin does not allow this account to place this order.",
        cause: "Trading of the symbol is closed, for this account or for all accounts.",
        fix: "Check on KuCoin's site whether this account can trade the symbol. If it can, contact KuCoin support.",
    },
    Advice {
        topic: "partner-unknown",
        codes: &[(EVERY, &["400200"])],
        meaning: "KuCoin reports that the partner in the request does not exist.",
        cause: "The partner's id in the rules is wrong, or the partnership has ended.",
        fix: "Correct the `id` under `partner` of the account in the rules.",
    },
    Advice {
        topic: "position-mode-mismatch",
        codes: &[(FUTURES, &["330005", "330011", "330012"])],
        meaning: "The order does not match the margin mode or the position mode of the account.",
        cause: "The order says isolated and the account is set to cross, or the order says one-way and the account is set to \
                hedge, or the reverse.",
        fix: "Set `marginMode` and `positionSide` of the order to the account's modes, or change the account's mode while it \
              has no open orders or positions.",
    },
    Advice {
        topic: "position-not-found",
        codes: &[(FUTURES, &["300009"])],
        meaning: "There is no position to close.",
        cause: "It is already closed, or the request names another symbol or side.",
        fix: "Read the open positions first, then close one of them.",
    },
    Advice {
        topic: "position-busy",
        codes: &[(FUTURES, &["300014", "300015"])],
        meaning: "The position is being liquidated or settled, so KuCoin accepts no orders for it.",
        cause: "It ran out of margin (300014), or a settlement is in progress (300015).",
        fix: "During a settlement, try again after a few seconds. After a liquidation, read the positions before you continue.",
    },
    Advice {
        topic: "kucoin-failed",
        codes: &[
            (
                EVERY,
                &[
                    "230005", "408000", "500", "500000", "503", "503000", "504000", "505000",
                ],
            ),
            (FUTURES, &["100000", "100002"]),
            (
                SPOT,
                &[
                    "126000", "126038", "126039", "130202", "135005", "135018", "400400",
                ],
            ),
            (
                UNIFIED,
                &[
                    "106204", "109099", "110000", "110001", "112001", "112002", "112003",
                ],
            ),
        ],
        meaning: "KuCoin had an internal error.",
        cause: "It was overloaded, slow or broken for a moment. The request may have been executed anyway.",
        fix: "Reads can be repeated. Before sending an order again, look the order up by its clientOid.",
    },
    Advice {
        topic: OUTCOME_UNCLEAR,
        codes: &[],
        meaning: "KuCoin's answer does not show whether the request was executed.",
        cause: "The answer's code is missing or unreadable, is not documented for this request, or contradicts the HTTP \
                status or another field.",
        fix: "Before sending an order again, look the order up by its clientOid.",
    },
    Advice {
        topic: CODE_UNKNOWN,
        codes: &[],
        meaning: "The broker does not recognize this code, so the outcome of the request is unknown.",
        cause: "The code is newer than this credbroker release, or KuCoin uses it for a product for which it is not documented.",
        fix: "Before sending an order again, look the order up by its clientOid. If KuCoin's documentation says that the code \
              means a rejection, an admin can add it to `exchange.refusal_codes` in the configuration.",
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::net::Ipv4Addr;
    use std::time::UNIX_EPOCH;

    use bytes::Bytes;
    use http::HeaderMap;

    use super::super::code::{self, RefusalCodes};
    use super::super::{Catalog, RequestContext, Risk};
    use super::*;

    const EGRESS_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));

    /// KuCoin API documentation, "Error Code": gateway, HTTP and WebSocket tables; 401000 and 408000 as seen by ccxt.
    const GATEWAY: [&str; 43] = [
        "400001", "400002", "400003", "400004", "400005", "400006", "400007", "400008", "400009",
        "400010", "400011", "400012", "400200", "400201", "400202", "400301", "400302", "400303",
        "400304", "400400", "400401", "400100", "400101", "400102", "404000", "405", "415000",
        "411100", "411200", "429000", "429001", "429002", "1015", "401000", "500000", "503000",
        "504000", "505000", "230005", "408000", "420001", "420002", "501000",
    ];

    /// Business codes of single products and their topics, from the same pages.
    const BUSINESS: [(Scope, &str, &str); 33] = [
        (Scope::SpotMargin, "200004", "funds-missing"),
        (Scope::SpotMargin, "130301", "funds-missing"),
        (Scope::Futures, "300003", "futures-funds-missing"),
        (Scope::Futures, "200005", "futures-funds-missing"),
        (Scope::Unified, "106150", "unified-funds-missing"),
        (Scope::Futures, "300018", "client-oid-repeated"),
        (Scope::SpotMargin, "126044", "client-oid-repeated"),
        (Scope::Unified, "106151", "client-oid-repeated"),
        (Scope::Futures, "100004", "order-not-found"),
        (Scope::SpotMargin, "order_not_exist", "order-not-found"),
        (Scope::Unified, "106102", "order-not-found"),
        (Scope::SpotMargin, "200003", "order-limited"),
        (Scope::Futures, "200003", "parameter-wrong"),
        (Scope::Futures, "300012", "order-limited"),
        (Scope::SpotMargin, "200001", "symbol-closed"),
        (Scope::Futures, "300002", "symbol-closed"),
        (Scope::Unified, "106053", "symbol-closed"),
        (Scope::SpotMargin, "200009", "identity-unverified"),
        (Scope::SpotMargin, "400500", "region-restricted"),
        (Scope::SpotMargin, "400700", "account-restricted"),
        (Scope::Futures, "40010", "region-restricted"),
        (Scope::Unified, "301100", "account-restricted"),
        (Scope::SpotMargin, "400413", "feature-removed"),
        (Scope::SpotMargin, "101030", "margin-not-enabled"),
        (Scope::Unified, "112010", "not-a-unified-account"),
        (Scope::SpotMargin, "260210", "withdrawal-closed"),
        (Scope::Futures, "330005", "position-mode-mismatch"),
        (Scope::Futures, "330012", "position-mode-mismatch"),
        (Scope::Futures, "300009", "position-not-found"),
        (Scope::Futures, "300015", "position-busy"),
        (Scope::Unified, "112001", "kucoin-failed"),
        (Scope::Futures, "100000", "kucoin-failed"),
        (Scope::SpotMargin, "126000", "kucoin-failed"),
    ];

    fn topics(scope: Option<Scope>, code: &str) -> Vec<&'static str> {
        meanings(scope, code).map(|advice| advice.topic).collect()
    }

    #[test]
    fn every_gateway_code_has_advice_in_every_scope() {
        for code in GATEWAY {
            for scope in Scope::ALL {
                assert!(of(Some(scope), code).is_some(), "{code} in {scope}");
            }
        }
        assert!(of(None, "123456").is_none());
        assert!(of(None, "200000").is_none());
    }

    #[test]
    fn business_codes_have_the_advice_of_their_product() {
        for (scope, code, topic) in BUSINESS {
            assert_eq!(of(Some(scope), code).unwrap().topic, topic, "{code}");
        }
        assert_eq!(
            topics(Some(Scope::Futures), "200002"),
            ["futures-rate-limited"]
        );
        assert_eq!(
            topics(Some(Scope::SpotMargin), "200002"),
            ["cancel-suspended"]
        );
        assert_eq!(topics(Some(Scope::Unified), "200002"), [""; 0]);
        assert_eq!(
            topics(None, "200002"),
            ["futures-rate-limited", "cancel-suspended"]
        );
        assert_eq!(
            topics(Some(Scope::SpotMargin), "400400"),
            ["parameter-wrong", "kucoin-failed"]
        );
        assert_eq!(topics(Some(Scope::Unified), "400400"), ["login-needed"]);
        let both = ["order-forbidden", "partner-unknown"];
        assert_eq!(topics(Some(Scope::SpotMargin), "400200"), both);
        assert_eq!(topics(Some(Scope::Futures), "400200"), ["partner-unknown"]);
    }

    #[test]
    fn wrong_secret_and_wrong_passphrase_have_the_same_advice() {
        let of = |code| of(None, code).unwrap();
        assert!(std::ptr::eq(of("400004"), of("400005")));
        assert_eq!(
            of("400004").meaning,
            "Either the secret or the passphrase of this API key is wrong."
        );
    }

    #[test]
    fn message_decides_if_a_code_has_several_meanings() {
        let spot = |code, msg| of_message(Scope::SpotMargin, code, msg).unwrap().topic;
        for (code, msg, topic) in [
            ("400100", "account.available.amount", "funds-missing"),
            ("400100", "Balance insufficient!", "funds-missing"),
            (
                "400100",
                "order_not_exist_or_not_allow_to_cancel",
                "order-not-found",
            ),
            (
                "400100",
                "Order size below the minimum requirement.",
                "parameter-wrong",
            ),
            ("400200", "Forbidden to place an order", "order-forbidden"),
            ("400200", "Unknown partner.", "partner-unknown"),
            ("400200", "", "order-forbidden"),
        ] {
            assert_eq!(spot(code, msg), topic, "{code} {msg}");
        }
        let futures = |msg| of_message(Scope::Futures, "100001", msg).unwrap().topic;
        assert_eq!(futures("error.getOrder.orderNotExist"), "order-not-found");
        assert_eq!(futures("There are invalid parameters"), "parameter-wrong");
        for (.., name) in BY_MESSAGE {
            assert!(topic(name).is_some(), "{name}");
        }
    }

    #[test]
    fn fix_contains_the_facts_or_reads_well_without_them() {
        let whitelist = of(None, "400006").unwrap();
        let address = Some(IpAddr::from([203, 0, 113, 7]));
        let facts = AdviceContext {
            address,
            expected: address,
            permission: Some("Futures"),
        };
        assert_eq!(
            whitelist.fix(&facts),
            "Add 203.0.113.7 to the key's addresses under API Management > Edit > IP restriction."
        );
        assert!(
            whitelist
                .fix(&AdviceContext::default())
                .contains("Add the broker's egress address to")
        );
        let permission = of(None, "400007").unwrap();
        assert!(
            permission
                .fix(&facts)
                .contains(" tick the permission Futures under")
        );
        assert!(
            permission
                .fix(&AdviceContext::default())
                .contains(" tick the permission that KuCoin's documentation names")
        );
    }

    #[test]
    fn every_advice_has_its_own_topic_and_complete_sentences() {
        for advice in ALL {
            let Advice {
                topic,
                meaning,
                cause,
                ..
            } = advice;
            assert!(
                std::ptr::eq(super::topic(topic).unwrap(), advice),
                "{topic} occurs twice"
            );
            assert!(
                topic.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'),
                "{topic}"
            );
            for sentence in [*meaning, *cause, &advice.fix(&AdviceContext::default())] {
                assert!(sentence.ends_with('.'), "{topic}: {sentence}");
                assert!(
                    sentence.starts_with(|c: char| c.is_uppercase()),
                    "{topic}: {sentence}"
                );
                assert!(
                    !sentence.contains("  ") && !sentence.contains('{'),
                    "{topic}: {sentence}"
                );
            }
        }
    }

    fn answer(http_status: u16, body: &str) -> Answer {
        let endpoint = Catalog::get().by_id("spot.post.v1-hf-orders").unwrap();
        answer_of(endpoint, http_status, body)
    }

    fn answer_of(endpoint: &Endpoint, http_status: u16, body: &str) -> Answer {
        let asked = RequestContext {
            endpoint: Some(endpoint),
            scope: endpoint.scope.unwrap(),
            changes: !matches!(endpoint.risk, Risk::Public | Risk::Read),
            refusal_codes: &RefusalCodes::default(),
        };
        let status = StatusCode::from_u16(http_status).unwrap();
        let body = Bytes::from(body.to_owned());
        Answer::read(status, &HeaderMap::new(), body, asked, || UNIX_EPOCH)
    }

    #[test]
    fn advice_on_every_maybe_sent_answer_is_to_look_the_order_up() {
        let check_lookup_advice = |endpoint: &Endpoint, status, body: &str| {
            let answer = answer_of(endpoint, status, body);
            assert_eq!(answer.outcome, Outcome::MaybeSent, "{status} {body}");
            let scope = endpoint.scope.unwrap();
            let advice = for_bot(&answer, scope, Some(endpoint), EGRESS_IP);
            assert!(
                advice.contains("look the order up by its clientOid"),
                "{} {status} {body}: {advice:?}",
                endpoint.id
            );
        };
        let mut codes = BTreeSet::new();
        for endpoint in Catalog::get().endpoints() {
            let Some(scope) = endpoint.scope else {
                continue;
            };
            if matches!(endpoint.risk, Risk::Public | Risk::Read) {
                continue;
            }
            for code in code::unclear_codes() {
                let (product, none) = (Some(endpoint.product), RefusalCodes::default());
                let class = code::class(scope.host(), product, code, &[], &none);
                if class == Class::Unclear {
                    for status in [200, 400, 502] {
                        let body = format!(r#"{{"code":"{code}","msg":"failed"}}"#);
                        check_lookup_advice(endpoint, status, &body);
                    }
                    codes.insert(code);
                }
            }
            for (status, body) in [
                (502, r#"{"code":"400100","msg":"Order size invalid"}"#),
                (503, r#"{"code":"429000","msg":"Too Many Requests"}"#),
                (503, r#"{"code":"400006"}"#),
                (500, r#"{"code":"200000","data":{}}"#),
                (200, r#"{"code":"200000","success":false}"#),
                (200, r#"{"code":"400100","success":true}"#),
                (502, "<html>502</html>"),
                (200, ""),
            ] {
                check_lookup_advice(endpoint, status, body);
            }
        }
        let all: BTreeSet<_> = code::unclear_codes().collect();
        assert_eq!(codes, all);
    }

    #[test]
    fn advice_for_a_bot_names_address_and_permission() {
        let endpoint = Catalog::get().by_id("spot.post.v1-hf-orders");
        let advice = |status, body: &str| {
            let answer = answer(status, body);
            for_bot(&answer, Scope::SpotMargin, endpoint, EGRESS_IP)
        };
        assert_eq!(
            advice(
                403,
                r#"{"code":"400006","msg":"Invalid request IP, the current client IP is: 203.0.113.7."}"#
            ),
            "The request's IP address is not whitelisted for this API key. The key has an IP restriction, and this address is not on \
             its list. Add 203.0.113.7 to the key's addresses under API Management > Edit > IP restriction."
        );
        assert_eq!(
            advice(
                403,
                r#"{"code":"400006","msg":"Invalid request IP, the current client IP is: 198.51.100.9."}"#
            ),
            "The request's IP address is not whitelisted for this API key. The key has an IP restriction, and this address is not on \
             its list. KuCoin saw 198.51.100.9, not the expected 203.0.113.7. Find out which address is right. If it is 203.0.113.7, \
             correct the route by which the broker's requests leave, and do not whitelist 198.51.100.9. If it is 198.51.100.9, set \
             egress.expected_ip to it and add it to the key's addresses under API Management > Edit > IP restriction."
        );
        let refused = advice(
            403,
            r#"{"code":"400007","msg":"Access denied, requires more permission."}"#,
        );
        assert!(
            refused.contains("tick the permission Spot under"),
            "{refused}"
        );
        let unknown = advice(200, r#"{"code":"999999","msg":"new"}"#);
        assert!(
            unknown.starts_with("The broker does not recognize this code"),
            "{unknown}"
        );
        assert!(unknown.contains("exchange.refusal_codes"), "{unknown}");
        assert!(advice(429, "<html>1015</html>").contains("for about 30 seconds"));
        for (status, body) in [
            (200, r#"{"code":"200000","data":{}}"#),
            (400, r#"{"code":"999999","msg":"new"}"#),
            (403, "<html>blocked</html>"),
        ] {
            assert_eq!(advice(status, body), "", "{body}");
        }
    }
}
