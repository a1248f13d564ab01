//! What KuCoin's refusals mean and what to do about them: the one table of sentences, for bots, admins and documents.
//!
//! Sources: KuCoin API documentation, "Error Code" (HTTP, gateway, spot, margin, futures, UTA, WebSocket), and codes that ccxt has
//! seen. The same number means different things in different products, so codes stand under the scopes that they are of.

use std::net::IpAddr;

use http::StatusCode;

use super::broker_query::address_in;
use super::code::{Class, RefusalCode};
use super::{Answer, Endpoint, Scope};
use crate::base::outcome::Outcome;

/// Advice on one kind of refusal.
#[derive(Debug)]
pub struct Advice {
    /// A word for it that does not change, in kebab case.
    pub topic: &'static str,
    /// Codes that mean it, with the scopes in which they do; none: it shows otherwise.
    pub codes: &'static [(&'static [Scope], &'static [&'static str])],
    /// What is wrong, one sentence.
    pub(crate) meaning: &'static str,
    /// Why that usually is.
    pub(crate) cause: &'static str,
    /// What to do; facts take the place of [`ADDRESS`] and [`PERMISSION`].
    fix: &'static str,
}

/// What is known about a refused request besides its code; makes a fix exact.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct AdviceContext<'f> {
    /// The address that KuCoin saw, or must see.
    pub(crate) address: Option<IpAddr>,
    /// The permission that the request needs, in the words of KuCoin's page.
    pub(crate) permission: Option<&'f str>,
}

/// Stands in a fix for the address, and what is said where it is not known.
const ADDRESS: (&str, &str) = ("{address}", "the broker's egress address");

/// The same for the permission.
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

/// The topic of a code that no table has.
const CODE_UNKNOWN: &str = "code-unknown";

/// The topic of an answer that leaves the outcome open although its code, if any, says nothing of the kind.
const OUTCOME_UNCLEAR: &str = "outcome-unclear";

/// Topics of codes that leave the outcome open.
const UNCLEAR: [&str; 2] = ["stream-ended", "kucoin-failed"];

/// The advice on `code` in `scope`, or in any where none is given; the likeliest where a code means several things.
pub(crate) fn of(scope: Option<Scope>, code: &str) -> Option<&'static Advice> {
    meanings(scope, code).next()
}

/// The same, by `msg` where the code alone does not tell.
pub(crate) fn of_message(scope: Scope, code: &str, msg: &str) -> Option<&'static Advice> {
    let msg = msg.to_ascii_lowercase();
    let told = BY_MESSAGE
        .iter()
        .find(|(overloaded, part, _)| *overloaded == code && msg.contains(part));
    told.map_or_else(|| of(Some(scope), code), |(.., name)| topic(name))
}

/// The advice of this topic.
pub(crate) fn topic(name: &str) -> Option<&'static Advice> {
    ALL.iter().find(|advice| advice.topic == name)
}

/// Everything that `word`, a code or a topic, means in `scope`, or in any where none is given; the likeliest first.
pub(crate) fn meanings(scope: Option<Scope>, word: &str) -> impl Iterator<Item = &'static Advice> {
    ALL.iter()
        .filter(move |advice| advice.topic == word || advice.is_of(scope, word))
}

/// What a bot is told about an answer to a request in `scope`. Empty: the exchange took the request, or there is nothing to say.
pub(crate) fn for_bot(answer: &Answer, scope: Scope, endpoint: Option<&Endpoint>) -> String {
    if answer.outcome == Outcome::Accepted {
        return String::new();
    }
    // The edge's own page has no code.
    let code = match answer.code.as_str() {
        "" if answer.http_status == StatusCode::TOO_MANY_REQUESTS => "1015",
        code => code,
    };
    let is_configurable = || {
        let product = endpoint.map(|endpoint| endpoint.product);
        RefusalCode::new(scope.host(), product, code).is_ok()
    };
    // An open outcome is looked up, whatever the code would mean in an answer that settles it.
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
        permission: endpoint.and_then(|endpoint| endpoint.permission.as_deref()),
    })
}

impl Advice {
    /// What to do, with the facts at hand.
    pub(crate) fn fix(&self, facts: &AdviceContext) -> String {
        let address = facts.address.map(|address| address.to_string());
        let permission = facts
            .permission
            .map(|name| format!("the permission {name}"));
        let told = |fact: Option<String>, unknown: &str| fact.unwrap_or_else(|| unknown.to_owned());
        self.fix
            .replace(ADDRESS.0, &told(address, ADDRESS.1))
            .replace(PERMISSION.0, &told(permission, PERMISSION.1))
    }

    /// All of it as one paragraph.
    pub(crate) fn text(&self, facts: &AdviceContext) -> String {
        format!("{} {} {}", self.meaning, self.cause, self.fix(facts))
    }

    /// Whether `code` means this in `scope`, or in any where none is given.
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

/// All advice: keys first, then accounts, requests, limits, orders, and KuCoin itself. Of two that share a code and a scope the
/// likelier one stands first.
pub static ALL: &[Advice] = &[
    Advice {
        topic: "key-unknown",
        codes: &[(EVERY, &["400003"])],
        meaning: "KuCoin does not know this API key.",
        cause: "It was deleted, has expired, or belongs to another KuCoin site than the account's.",
        fix: "Look for the key under API Management on the account's KuCoin site. If it is gone, create a new \
              key there and register it. If it belongs to another site, correct `site` of the account in the rules.",
    },
    Advice {
        topic: "secret-or-passphrase-wrong",
        codes: &[(EVERY, &["400004", "400005"])],
        meaning: "Either the secret or the passphrase of this API key is wrong.",
        cause: "KuCoin checks the passphrase with the help of the secret, so a wrong secret looks like a wrong passphrase.",
        fix: "Register the key again, with secret and passphrase exactly as they were when it was created; the passphrase \
              is not the trading password. If they are lost, create a new key under API Management.",
    },
    Advice {
        topic: "address-not-whitelisted",
        codes: &[(EVERY, &["400006"])],
        meaning: "KuCoin takes no requests with this API key from the address that this one came from.",
        cause: "The key is restricted to certain IP addresses, and this one is not among them.",
        fix: "Add {address} to the key's addresses under API Management > Edit > IP restriction.",
    },
    Advice {
        topic: "permission-missing",
        codes: &[(EVERY, &["400007"])],
        meaning: "This API key is not allowed to do this.",
        cause: "A permission that the request needs is not ticked for the key.",
        fix: "If the key should be allowed to do it, tick {permission} under API Management > Edit > API permissions.",
    },
    Advice {
        topic: "key-too-old",
        codes: &[(EVERY, &["400008"])],
        meaning: "KuCoin no longer accepts API keys of this version.",
        cause: "Keys of version 1 and 2 are shut out from this request.",
        fix: "Create a new key under API Management, which will have version 3, and register it.",
    },
    Advice {
        topic: "key-version-wrong",
        codes: &[(EVERY, &["400009"])],
        meaning: "KuCoin does not accept the key version that was sent.",
        cause: "The version that is stored with the key is not the one that KuCoin has for it.",
        fix: "Register the key again, which finds the version out. API Management shows it beside the key.",
    },
    Advice {
        topic: "account-not-allowed",
        codes: &[(EVERY, &["400010"])],
        meaning: "KuCoin does not let this account do this.",
        cause: "It is the account (its UID) that lacks the right, and not the key: often a sub-account that was not opened for \
                this product.",
        fix: "Open the product for the account on KuCoin's site; for a sub-account, in the master account under Sub-Account. \
              If it is open, ask KuCoin's support.",
    },
    Advice {
        topic: "partner-signature-wrong",
        codes: &[(EVERY, &["400201"])],
        meaning: "KuCoin refused the partner's signature.",
        cause: "The partner key that is stored with the API key does not belong to the partner that the rules name.",
        fix: "Store the right `partner_key` with the key, or correct the partner's `id` in the rules.",
    },
    Advice {
        topic: "partner-address-refused",
        codes: &[(EVERY, &["400202"])],
        meaning: "KuCoin takes no requests of this partner from the address that this one came from.",
        cause: "The partner is restricted to certain IP addresses, and this one is not among them.",
        fix: "Ask your contact at KuCoin to add {address} to the partner's addresses.",
    },
    Advice {
        topic: "account-frozen",
        codes: &[(EVERY, &["411100"])],
        meaning: "KuCoin has frozen this account.",
        cause: "KuCoin's risk control froze it, or its owner did.",
        fix: "Stop the bots of this account, and ask KuCoin's support why it is frozen.",
    },
    Advice {
        topic: "account-restricted",
        codes: &[
            (SPOT, &["126002", "400444", "400700"]),
            (UNIFIED, &["301100", "301101", "301102", "301103", "301133"]),
        ],
        meaning: "KuCoin has restricted what this account may do.",
        cause: "Its risk control, or a rule about the region or the identity of the owner, stopped the request.",
        fix: "Log in on KuCoin's site, which says what it asks for, or ask KuCoin's support.",
    },
    Advice {
        topic: "region-restricted",
        codes: &[
            (EVERY, &["400301", "400302"]),
            (FUTURES, &["40010"]),
            (SPOT, &["126021", "126037", "126045", "126046", "400500"]),
        ],
        meaning: "KuCoin does not offer this in the region of the account or of the IP address.",
        cause: "Local law or KuCoin's own rules forbid it. What counts is the owner's identity, or where the address is.",
        fix: "Check that KuCoin serves the owner's country, and the country of {address}; KuCoin's support knows which of the \
              two it is.",
    },
    Advice {
        topic: "identity-unverified",
        codes: &[
            (EVERY, &["400303", "400304"]),
            (SPOT, &["126005", "126047", "126048", "200009"]),
        ],
        meaning: "KuCoin asks the owner of this account to verify their identity first.",
        cause: "The identity verification (KYC) is missing or not far enough; for a sub-account the master account's counts.",
        fix: "Complete the identity verification on KuCoin's site, in the master account.",
    },
    Advice {
        topic: "margin-not-enabled",
        codes: &[(SPOT, &["101030", "130306", "130307", "130323"])],
        meaning: "Margin trading is not switched on for this account.",
        cause: "Nobody has accepted KuCoin's margin agreement in it.",
        fix: "Log in to the account on KuCoin's site, open margin trading once and accept the agreement.",
    },
    Advice {
        topic: "convert-not-enabled",
        codes: &[(SPOT, &["102441"])],
        meaning: "Converting is not switched on for this account.",
        cause: "Nobody has accepted KuCoin's convert agreement in it.",
        fix: "Log in to the account on KuCoin's site, open Convert once and accept the agreement.",
    },
    Advice {
        topic: "not-a-unified-account",
        codes: &[(UNIFIED, &["112010"])],
        meaning: "This is not a unified account.",
        cause: "The account is in classic mode, and the request is one for unified accounts.",
        fix: "Use the scopes spot-margin and futures, or switch the account to unified trading on KuCoin's site.",
    },
    Advice {
        topic: "withdrawal-closed",
        codes: &[(SPOT, &["260210"]), (SPOT_OR_UNIFIED, &["110003"])],
        meaning: "KuCoin does not take this withdrawal now.",
        cause: "Withdrawals of this currency or of this account are closed (260210), or the amount for 24 hours is used up \
                (110003).",
        fix: "Look at the currency and at the account's limits on KuCoin's site, or ask KuCoin's support.",
    },
    Advice {
        topic: "headers-missing",
        codes: &[(EVERY, &["400001"])],
        meaning: "KuCoin found no API headers on the request, or does not know its path.",
        cause: "The broker sets the headers itself, so it is mostly the path that is wrong.",
        fix: "Compare the path with KuCoin's documentation. If it is right, report the request id as a credbroker bug.",
    },
    Advice {
        topic: "timestamp-off",
        codes: &[(EVERY, &["400002"])],
        meaning: "KuCoin refused the time in the request.",
        cause: "It was more than 5 seconds off when the request arrived: the clock is wrong, or the request was under way for \
                too long.",
        fix: "Send the request again: after such a refusal the broker asks KuCoin for its time. If it comes back, check \
              the clock of the broker's machine and its connection to KuCoin.",
    },
    Advice {
        topic: "parameter-wrong",
        codes: &[
            (EVERY, &["400100", "400101", "400102"]),
            (SPOT, &["400400"]),
            (FUTURES, &["100001", "100003", "200003", "300000"]),
        ],
        meaning: "KuCoin does not accept a value in the request.",
        cause: "A value is missing, misspelt or out of range; `msg` mostly says which. KuCoin also uses 400100 where money is \
                missing or an order cannot be cancelled.",
        fix: "Correct the request by `msg` and KuCoin's documentation; the steps of size and price are in the symbol's details.",
    },
    Advice {
        topic: "endpoint-unknown",
        codes: &[(EVERY, &["404", "404000", "405"])],
        meaning: "KuCoin has no such path, or not with this method.",
        cause: "A typing error, an endpoint that KuCoin has removed, or one that another scope's host serves.",
        fix: "Compare method, path and scope with KuCoin's documentation.",
    },
    Advice {
        topic: "endpoint-retired",
        codes: &[(EVERY, &["401000"])],
        meaning: "KuCoin has shut this endpoint down.",
        cause: "It is an old one that another has replaced.",
        fix: "Use the endpoint that KuCoin's documentation and change log name in its place.",
    },
    Advice {
        topic: "feature-removed",
        codes: &[(EVERY, &["400413"])],
        meaning: "KuCoin no longer takes hidden and iceberg orders.",
        cause: "Since August 2026 it refuses orders that have their parameters.",
        fix: "Leave `hidden`, `iceberg` and `visibleSize` out of the order.",
    },
    Advice {
        topic: "media-type-wrong",
        codes: &[(EVERY, &["415000"])],
        meaning: "KuCoin does not accept the form of the body.",
        cause: "It takes JSON and nothing else.",
        fix: "Send JSON in the body of a POST, and no body with a GET. If it is so, report the request id as a credbroker bug.",
    },
    Advice {
        topic: "url-blocked",
        codes: &[(EVERY, &["411200"])],
        meaning: "KuCoin has blocked this path for this account.",
        cause: "The path is on a list that KuCoin keeps for the account.",
        fix: "Ask KuCoin's support, and name the path.",
    },
    Advice {
        topic: "login-needed",
        codes: &[(EVERY, &["400401"]), (NOT_SPOT, &["400400"])],
        meaning: "KuCoin asks for a login that no API key gives.",
        cause: "The path is for the website or for apps, which log in otherwise.",
        fix: "Use a path of KuCoin's API documentation.",
    },
    Advice {
        topic: "session-refused",
        codes: &[(EVERY, &["400011", "400012"])],
        meaning: "KuCoin did not let a WebSocket session begin.",
        cause: "The answer to its challenge was wrong (400011) or came later than after about 30 seconds (400012).",
        fix: "Connect again and answer at once. credbroker opens no such sessions: send orders through SignAndSend.",
    },
    Advice {
        topic: "stream-ended",
        codes: &[(EVERY, &["420001", "420002", "501000"])],
        meaning: "KuCoin has ended a WebSocket connection.",
        cause: "A server of KuCoin's was shut down, or the connection broke rules or grew too old.",
        fix: "Connect again after a moment. If it came as the answer to an order, look the order up by its clientOid before \
              sending it again.",
    },
    Advice {
        topic: "rate-limited",
        codes: &[(EVERY, &["429000"])],
        meaning: "KuCoin takes no more requests of this kind for a moment.",
        cause: "The account has used up its quota for them, or KuCoin is overloaded.",
        fix: "Wait `retry_after_ms` where it is set, otherwise a second and longer each time; then send fewer requests.",
    },
    Advice {
        topic: "futures-rate-limited",
        codes: &[(FUTURES, &["200002"])],
        meaning: "KuCoin takes no more futures requests of this kind for 10 seconds.",
        cause: "Too many of them came in a short time.",
        fix: "Wait 10 seconds, then send fewer requests.",
    },
    Advice {
        topic: "kucoin-overloaded",
        codes: &[(EVERY, &["429001"])],
        meaning: "KuCoin takes no more requests from anybody for a moment.",
        cause: "A limit for all its customers together was reached.",
        fix: "Wait a second, and longer each time, and send the request again.",
    },
    Advice {
        topic: "connection-limited",
        codes: &[(EVERY, &["429002"])],
        meaning: "KuCoin takes no more requests on this connection for a moment.",
        cause: "Too many came on it in a short time.",
        fix: "Wait a second, then send fewer requests at once.",
    },
    Advice {
        topic: "edge-blocked",
        codes: &[(EVERY, &["1015"])],
        meaning: "KuCoin's network has blocked the broker's address for about 30 seconds.",
        cause: "All bots together sent too many requests from one address: about 500 in 10 seconds are allowed.",
        fix: "Wait 30 seconds with every bot of this broker, then send fewer requests; take market data from WebSocket streams.",
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
        meaning: "There is not enough money for this request where it is needed.",
        cause: "Spot orders use the trading account only, margin orders the margin account; what open orders hold does not \
                count. Often the money is still in the main account.",
        fix: "Compare the balances (`GET /api/v1/accounts`). If the money is in `main`, transfer it to the trading account on \
              KuCoin's site under Assets > Transfer; otherwise send a smaller order.",
    },
    Advice {
        topic: "funds-in-main",
        codes: &[],
        meaning: "Balances are in the main account, not in the trading account.",
        cause: "Deposits arrive in the main account, which KuCoin's site calls Funding Account; spot orders use the Trading \
                Account only.",
        fix: "Transfer the money on KuCoin's site under Assets > Transfer, from Funding Account to Trading Account.",
    },
    Advice {
        topic: "futures-funds-missing",
        codes: &[(FUTURES, &["200005", "300003", "330008"])],
        meaning: "There is not enough money in the futures account for this request.",
        cause: "Only the futures account counts, less what positions and open orders hold.",
        fix: "Transfer money to the futures account on KuCoin's site under Assets > Transfer, or send a smaller order.",
    },
    Advice {
        topic: "unified-funds-missing",
        codes: &[(UNIFIED, &["106150", "106212", "301130"])],
        meaning: "There is not enough money in the unified account for this request.",
        cause: "What positions, loans and open orders hold does not count, and neither does money in the Funding Account.",
        fix: "Transfer money to the unified account on KuCoin's site under Assets > Transfer, or send a smaller order.",
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
        fix: "Look the first order up by its clientOid and go by it. Use a new clientOid for a new order.",
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
        cause: "It is filled or cancelled already, its id or symbol is wrong, or it was placed so recently that it does not \
                show yet.",
        fix: "Look the order up by its clientOid; if it was just placed, several times over some seconds.",
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
        meaning: "The order goes beyond a limit of KuCoin's.",
        cause: "There are too many open orders, or size, price or position are outside what the symbol or the account's risk \
                limit allows; `msg` mostly says which.",
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
        cause: "It is not open yet, suspended, delisted, or misspelt.",
        fix: "Look the symbol up in KuCoin's symbol list and announcements. A suspension passes: try again later.",
    },
    Advice {
        topic: "cancel-suspended",
        codes: &[(SPOT, &["126010", "200002"])],
        meaning: "KuCoin does not take cancellations for this symbol now.",
        cause: "Trading of the symbol is suspended, mostly for maintenance or delisting.",
        fix: "The order is still open: try again until it is cancelled, and look at KuCoin's announcements.",
    },
    Advice {
        topic: "order-forbidden",
        codes: &[(SPOT, &["400200"])],
        meaning: "KuCoin does not let this account place this order.",
        cause: "Trading of the symbol is closed, for this account or for everybody.",
        fix: "Check on KuCoin's site whether this account can trade the symbol. If it can, ask KuCoin's support.",
    },
    Advice {
        topic: "partner-unknown",
        codes: &[(EVERY, &["400200"])],
        meaning: "KuCoin does not know the partner that the request names.",
        cause: "The partner's id in the rules is wrong, or the partnership has ended.",
        fix: "Correct the `id` under `partner` of the account in the rules.",
    },
    Advice {
        topic: "position-mode-mismatch",
        codes: &[(FUTURES, &["330005", "330011", "330012"])],
        meaning: "The order does not fit the margin mode or the position mode of the account.",
        cause: "The order says isolated and the account cross, or one-way and the account hedge, or the other way round.",
        fix: "Set `marginMode` and `positionSide` of the order as the account has them, or change the account's mode while \
              nothing is open.",
    },
    Advice {
        topic: "position-not-found",
        codes: &[(FUTURES, &["300009"])],
        meaning: "There is no position to close.",
        cause: "It is closed already, or it is one of another symbol or side.",
        fix: "Read the open positions first, and close what is there.",
    },
    Advice {
        topic: "position-busy",
        codes: &[(FUTURES, &["300014", "300015"])],
        meaning: "The position is being liquidated or settled and takes no orders.",
        cause: "It ran out of margin (300014), or it is the time of a settlement (300015).",
        fix: "Try again after some seconds if it is a settlement. After a liquidation, read the positions before going on.",
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
        meaning: "Something inside KuCoin failed.",
        cause: "It was busy, slow or broken for a moment. What the request was to change may have been changed all the same.",
        fix: "Repeat a read. Look an order up by its clientOid before sending it again.",
    },
    Advice {
        topic: OUTCOME_UNCLEAR,
        codes: &[],
        meaning: "KuCoin's answer does not say whether the request was executed.",
        cause: "It has no code that can be read, a code that is not documented for this request, or a code that does not fit the \
                HTTP status or the other fields of the answer.",
        fix: "Look an order up by its clientOid before sending it again.",
    },
    Advice {
        topic: CODE_UNKNOWN,
        codes: &[],
        meaning: "The broker does not know this code of KuCoin's, so it cannot tell whether the request was executed.",
        cause: "KuCoin has added the code, or uses it for a product where it was not documented.",
        fix: "Look an order up by its clientOid before sending it again. Where KuCoin's documentation says that the code means a \
              refusal, an admin can add it to `exchange.refusal_codes` in the configuration.",
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::UNIX_EPOCH;

    use bytes::Bytes;
    use http::HeaderMap;

    use super::super::code::{self, RefusalCodes};
    use super::super::{Asked, Catalog, Risk};
    use super::*;

    /// KuCoin API documentation, "Error Code": gateway, HTTP and WebSocket tables; 401000 and 408000 as ccxt has seen them.
    const GATEWAY: [&str; 43] = [
        "400001", "400002", "400003", "400004", "400005", "400006", "400007", "400008", "400009",
        "400010", "400011", "400012", "400200", "400201", "400202", "400301", "400302", "400303",
        "400304", "400400", "400401", "400100", "400101", "400102", "404000", "405", "415000",
        "411100", "411200", "429000", "429001", "429002", "1015", "401000", "500000", "503000",
        "504000", "505000", "230005", "408000", "420001", "420002", "501000",
    ];

    /// Business codes of single products, by what they mean; the same pages.
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
    fn business_codes_mean_what_they_mean_in_their_product() {
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
    fn a_wrong_secret_and_a_wrong_passphrase_share_one_sentence() {
        let of = |code| of(None, code).unwrap();
        assert!(std::ptr::eq(of("400004"), of("400005")));
        assert_eq!(
            of("400004").meaning,
            "Either the secret or the passphrase of this API key is wrong."
        );
    }

    #[test]
    fn the_message_tells_where_a_code_means_several_things() {
        let told = |code, msg| of_message(Scope::SpotMargin, code, msg).unwrap().topic;
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
            assert_eq!(told(code, msg), topic, "{code} {msg}");
        }
        let futures = |msg| of_message(Scope::Futures, "100001", msg).unwrap().topic;
        assert_eq!(futures("error.getOrder.orderNotExist"), "order-not-found");
        assert_eq!(futures("There are invalid parameters"), "parameter-wrong");
        for (.., name) in BY_MESSAGE {
            assert!(topic(name).is_some(), "{name}");
        }
    }

    #[test]
    fn facts_make_a_fix_exact_and_without_them_it_reads_as_well() {
        let whitelist = of(None, "400006").unwrap();
        let address = Some(IpAddr::from([203, 0, 113, 7]));
        let facts = AdviceContext {
            address,
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
    fn every_advice_is_whole_sentences_under_a_topic_of_its_own() {
        for advice in ALL {
            let Advice {
                topic,
                meaning,
                cause,
                ..
            } = advice;
            assert!(
                std::ptr::eq(super::topic(topic).unwrap(), advice),
                "{topic} is there twice"
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
        let asked = Asked {
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
        let is_to_look_up = |endpoint: &Endpoint, status, body: &str| {
            let answer = answer_of(endpoint, status, body);
            assert_eq!(answer.outcome, Outcome::MaybeSent, "{status} {body}");
            let told = for_bot(&answer, endpoint.scope.unwrap(), Some(endpoint));
            assert!(
                told.to_ascii_lowercase().contains("look an order up")
                    || told.contains("look the order up"),
                "{} {status} {body}: {told:?}",
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
                        is_to_look_up(endpoint, status, &body);
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
                is_to_look_up(endpoint, status, body);
            }
        }
        let all: BTreeSet<_> = code::unclear_codes().collect();
        assert_eq!(codes, all);
    }

    #[test]
    fn a_bot_is_told_what_the_answer_names() {
        let endpoint = Catalog::get().by_id("spot.post.v1-hf-orders");
        let told = |status, body: &str| for_bot(&answer(status, body), Scope::SpotMargin, endpoint);
        assert_eq!(
            told(
                403,
                r#"{"code":"400006","msg":"Invalid request IP, the current client IP is: 198.51.100.9."}"#
            ),
            "KuCoin takes no requests with this API key from the address that this one came from. The key is restricted to \
             certain IP addresses, and this one is not among them. Add 198.51.100.9 to the key's addresses under API Management > Edit > IP restriction."
        );
        let refused = told(
            403,
            r#"{"code":"400007","msg":"Access denied, requires more permission."}"#,
        );
        assert!(
            refused.contains("tick the permission Spot under"),
            "{refused}"
        );
        let unknown = told(200, r#"{"code":"999999","msg":"new"}"#);
        assert!(
            unknown.starts_with("The broker does not know this code"),
            "{unknown}"
        );
        assert!(unknown.contains("exchange.refusal_codes"), "{unknown}");
        assert!(told(429, "<html>1015</html>").contains("for about 30 seconds"));
        for (status, body) in [
            (200, r#"{"code":"200000","data":{}}"#),
            (400, r#"{"code":"999999","msg":"new"}"#),
            (403, "<html>blocked</html>"),
        ] {
            assert_eq!(told(status, body), "", "{body}");
        }
    }
}
