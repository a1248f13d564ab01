//! Conversions to messages for admins. No response contains a secret.

use crate::base::diagnosis::Diagnosis;
use crate::base::text::{MAX_CHARS, clean};
use crate::kucoin::Scope;
use crate::kucoin::key_info::KeyInfo;
use crate::ops::cancel_all::Cancelled;
use crate::ops::key_health::KeyHealth;
use crate::ops::key_test::Check;
use crate::proto::{self, KeyState};
use crate::restrictions::KeyDigest;

/// Text that may come from Vault or the exchange, escaped for an admin's terminal.
fn shown(text: impl AsRef<str>) -> String {
    clean(text.as_ref(), MAX_CHARS).into_owned()
}

impl From<KeyHealth> for KeyState {
    fn from(health: KeyHealth) -> Self {
        let info = health.info.as_deref();
        let permissions =
            info.map(|info| info.permissions.iter().map(|name| shown(name.to_string())));
        Self {
            account: health.account.to_string(),
            key: health.name.to_string(),
            scopes: in_proto(&health.scopes),
            status: health.status.into(),
            reasons: health.reasons(),
            version: health.version.unwrap_or_default(),
            permissions: permissions.map(Iterator::collect).unwrap_or_default(),
            is_whitelisted: health.is_whitelisted,
            used_at_ms: health.used_ms.unwrap_or_default(),
            tested_at_ms: health.tested_ms.unwrap_or_default(),
            uid: info
                .and_then(|info| info.uid.as_ref())
                .map(shown)
                .unwrap_or_default(),
            expires_at_ms: info.and_then(|info| info.expires_at_ms).unwrap_or_default(),
            id_sha256: health.id.map(KeyDigest::hex).unwrap_or_default(),
            needs_partner_key: health.needs_partner_key,
        }
    }
}

/// Scopes as numbers of the proto enum.
pub(super) fn in_proto(scopes: &[Scope]) -> Vec<i32> {
    let scopes = scopes.iter().copied();
    scopes
        .map(|scope| proto::Scope::from(scope).into())
        .collect()
}

impl From<&KeyInfo> for proto::KeyInfo {
    fn from(info: &KeyInfo) -> Self {
        Self {
            uid: info.uid.as_ref().map(shown).unwrap_or_default(),
            is_master: info.is_master,
            sub_name: info.sub_name.as_ref().map(shown).unwrap_or_default(),
            site: info.site.as_ref().map(shown).unwrap_or_default(),
            permissions: info
                .permissions
                .iter()
                .map(|name| shown(name.to_string()))
                .collect(),
            ip_whitelist: info.ip_whitelist.iter().map(shown).collect(),
            key_version: info
                .version
                .and_then(|version| version.try_into().ok())
                .unwrap_or_default(),
            created_at_ms: info.created_at_ms.unwrap_or_default(),
            expires_at_ms: info.expires_at_ms.unwrap_or_default(),
        }
    }
}

impl From<Diagnosis> for proto::Finding {
    fn from(found: Diagnosis) -> Self {
        Self {
            name: found.id.to_owned(),
            is_error: found.is_failed(),
            cause: found.cause,
            fix: found.fix,
        }
    }
}

impl From<Cancelled> for proto::Cancelled {
    fn from(cancelled: Cancelled) -> Self {
        Self {
            account: cancelled.account.to_string(),
            scope: proto::Scope::from(cancelled.scope).into(),
            requests: cancelled
                .checks
                .into_iter()
                .map(proto::RequestResult::from)
                .collect(),
            still_open: cancelled.still_open,
        }
    }
}

impl From<Check> for proto::RequestResult {
    fn from(check: Check) -> Self {
        Self {
            request: shown(check.request),
            is_ok: check.is_ok,
            result: shown(check.result),
        }
    }
}

impl From<Scope> for proto::Scope {
    fn from(scope: Scope) -> Self {
        match scope {
            Scope::Futures => Self::Futures,
            Scope::SpotMargin => Self::SpotMargin,
            Scope::Unified => Self::Unified,
        }
    }
}
