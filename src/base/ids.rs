//! Validated names from outside: accounts, keys, bots, admins, requests.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize, Serializer};

/// A text that is not a valid name, and what was expected.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("expected {expected}, got {got:?}")]
pub struct IdError {
    expected: &'static str,
    got: String,
}

impl IdError {
    pub(crate) fn new(expected: &'static str, got: &str) -> Self {
        // Keeps log lines and answers short.
        Self {
            expected,
            got: got.chars().take(80).collect(),
        }
    }
}

/// Defines a validated name: private text, one fallible constructor, safe to log. `$read` validates and normalizes the
/// text.
macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $read:path, $expected:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
        #[serde(try_from = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                $read(text).map(Self).ok_or_else(|| IdError::new($expected, text))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// Name of a KuCoin account, chosen by an admin: a letter or digit, then up to 31 characters of a-z, 0-9, '-'. Not secret.
    AccountId,
    short_name,
    "1 to 32 characters of a-z, 0-9 and '-', not starting with '-'"
);
name!(
    /// Name of a key of an account, the last part of its Vault path; same form as an account name. Not secret.
    KeyName,
    short_name,
    "1 to 32 characters of a-z, 0-9 and '-', not starting with '-'"
);
name!(
    /// A bot: the URI SAN `spiffe://<trust domain>/bot/<name>` of its certificate, or its DNS SAN if there is no URI SAN.
    /// DNS names are converted to lower case, because they are case-insensitive (RFC 5280, 4.2.1.6).
    BotId,
    bot,
    "spiffe://<trust domain>/bot/<name> or a DNS name"
);
name!(
    /// An admin: the URI SAN `spiffe://<trust domain>/admin/<name>` of the certificate.
    AdminId,
    spiffe_admin,
    "spiffe://<trust domain>/admin/<name>"
);
name!(
    /// Id of a call, chosen by the bot or generated here: 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-'.
    RequestId,
    request_id,
    "1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-'"
);

impl BotId {
    /// Reads a DNS SAN.
    ///
    /// # Errors
    /// If it is not a DNS name.
    pub(crate) fn from_dns_san(text: &str) -> Result<Self, IdError> {
        let name = dns_name(text).map(Self);
        name.ok_or_else(|| IdError::new("a DNS name", text))
    }

    /// Reads a URI SAN.
    ///
    /// # Errors
    /// If it is not the SPIFFE id of a bot.
    pub(crate) fn from_uri_san(text: &str) -> Result<Self, IdError> {
        let name = spiffe_bot(text).map(Self);
        name.ok_or_else(|| IdError::new("spiffe://<trust domain>/bot/<name>", text))
    }
}

impl RequestId {
    /// A new id: 32 random hex digits.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().simple().to_string().into())
    }
}

/// Who sends a request to the exchange.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Principal {
    /// An admin, over the admin listener.
    Admin(AdminId),
    /// A bot.
    Bot(BotId),
    /// The broker itself, to test a key.
    Broker,
}

impl Principal {
    /// The bot, if it is one.
    pub(crate) fn bot(&self) -> Option<&BotId> {
        match self {
            Self::Bot(bot) => Some(bot),
            Self::Admin(_) | Self::Broker => None,
        }
    }

    /// The name of a principal that is not a bot: the admin's name, or `broker`.
    pub(crate) fn other(&self) -> Option<&str> {
        match self {
            Self::Admin(admin) => Some(admin.as_str()),
            Self::Bot(_) => None,
            Self::Broker => Some("broker"),
        }
    }
}

/// Bytes as hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or('?');
    let nibbles = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    nibbles.map(digit).collect()
}

fn short_name(text: &str) -> Option<Box<str>> {
    let fits = text.len() <= 32
        && text.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && text
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    fits.then(|| text.into())
}

fn bot(text: &str) -> Option<Box<str>> {
    spiffe_bot(text).or_else(|| dns_name(text))
}

fn spiffe_bot(text: &str) -> Option<Box<str>> {
    is_spiffe(text, "/bot/").then(|| text.into())
}

fn spiffe_admin(text: &str) -> Option<Box<str>> {
    is_spiffe(text, "/admin/").then(|| text.into())
}

fn dns_name(text: &str) -> Option<Box<str>> {
    let name = text.to_ascii_lowercase();
    is_dns_name(&name).then(|| name.into())
}

fn is_spiffe(text: &str, role: &str) -> bool {
    let name = text.strip_prefix("spiffe://");
    name.and_then(|rest| rest.split_once(role))
        .is_some_and(|(domain, name)| is_dns_name(domain) && is_segment(name))
}

fn is_segment(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    (1..=128).contains(&text.len()) && text.bytes().all(fits) && !matches!(text, "." | "..")
}

/// Lower case only, because SPIFFE requires it of trust domains, and names are compared byte by byte.
fn is_dns_name(text: &str) -> bool {
    let label = |l: &str| {
        let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_');
        (1..=63).contains(&l.len())
            && l.bytes().all(fits)
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    text.len() <= 253 && text.split('.').all(label)
}

fn request_id(text: &str) -> Option<Box<str>> {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    let fits = (1..=64).contains(&text.len()) && text.bytes().all(fits);
    fits.then(|| text.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn account_and_key_names_cannot_leave_their_vault_path() {
        for good in ["main", "0", "a-b-1", &"x".repeat(32)] {
            assert!(good.parse::<AccountId>().is_ok(), "{good}");
        }
        for bad in [
            "",
            "-a",
            "A",
            "a/b",
            "..",
            "a.b",
            "a b",
            "ä",
            "a\n",
            &"x".repeat(33),
        ] {
            assert!(bad.parse::<KeyName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_bot_is_a_spiffe_bot_or_a_dns_name() {
        for good in [
            "spiffe://example.org/bot/maker",
            "spiffe://a/bot/M_1.x",
            "maker.bots.example.org",
            "maker",
        ] {
            assert!(good.parse::<BotId>().is_ok(), "{good}");
        }
        let bad = [
            "spiffe://example.org/admin/anna",
            "spiffe://example.org/bot/",
            "spiffe://example.org/bot/a/b",
            "spiffe:///bot/a",
            "spiffe://Example.org/bot/a",
            "https://example.org/bot/a",
            "*.example.org",
            "Maker.example.org/bot/a",
            "SPIFFE://example.org/bot/a",
            "a..b",
            "",
            "bot/a",
        ];
        for bad in bad {
            assert!(bad.parse::<BotId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn dns_names_are_case_insensitive_and_spiffe_ids_are_not() {
        let bot = |text: &str| text.parse::<BotId>().unwrap();
        assert_eq!(bot("Maker.Example.ORG").as_str(), "maker.example.org");
        assert_eq!(bot("Maker.Example.ORG"), bot("maker.example.org"));
        assert_ne!(
            bot("spiffe://example.org/bot/Maker"),
            bot("spiffe://example.org/bot/maker")
        );
        let stored: BotId = serde_json::from_str("\"Maker.Example.ORG\"").unwrap();
        assert_eq!(stored, bot("maker.example.org"));
    }

    #[test]
    fn uri_san_is_read_only_as_spiffe_id_and_dns_san_only_as_dns_name() {
        for uri in ["maker.example.org", "spiffe://example.org/admin/anna", ""] {
            assert!(BotId::from_uri_san(uri).is_err(), "{uri}");
        }
        for name in ["spiffe://example.org/bot/maker", "a b", ""] {
            assert!(BotId::from_dns_san(name).is_err(), "{name}");
        }
        let bot = BotId::from_dns_san("Maker.Example.ORG").unwrap();
        assert_eq!(bot.as_str(), "maker.example.org");
        assert!(BotId::from_uri_san("spiffe://example.org/bot/maker").is_ok());
    }

    #[test]
    fn an_admin_is_a_spiffe_admin_and_nothing_else() {
        assert!("spiffe://example.org/admin/anna".parse::<AdminId>().is_ok());
        let bad = [
            "spiffe://example.org/bot/maker",
            "spiffe://example.org/bot/admin/anna",
            "spiffe://example.org/admin/anna/bot/maker",
            "spiffe://example.org/admin/",
            "spiffe:///admin/anna",
            "https://example.org/admin/anna",
            "admin.example.org",
            "anna",
            "",
        ];
        for bad in bad {
            assert!(bad.parse::<AdminId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn error_shows_the_expected_form_and_the_given_text() {
        let error = "a b".parse::<RequestId>().unwrap_err().to_string();
        assert_eq!(
            error,
            "expected 1 to 64 characters of A-Z, a-z, 0-9, '.', '_', '-', got \"a b\""
        );
    }
}
