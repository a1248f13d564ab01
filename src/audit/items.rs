//! The orders of a batch in an audit line.

use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};

use super::{MAX_CLIENT_OID_CHARS, MAX_CLIENT_OIDS};
use crate::base::outcome::Outcome;
use crate::base::text::clean;
use crate::kucoin::BatchItem;

#[derive(Serialize)]
struct AuditedItem<'a> {
    #[serde(skip_serializing_if = "str::is_empty")]
    client_oid: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    order_id: &'a str,
    outcome: Outcome,
}

/// Serializes at most [`MAX_CLIENT_OIDS`] orders, each with ids, sanitized and truncated, and outcome.
pub(super) fn audited<S: Serializer>(
    items: &[BatchItem],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let items = items.iter().take(MAX_CLIENT_OIDS);
    let mut list = serializer.serialize_seq(Some(items.len()))?;
    for item in items {
        list.serialize_element(&AuditedItem {
            client_oid: &clean(&item.client_oid, MAX_CLIENT_OID_CHARS),
            order_id: &clean(&item.order_id, MAX_CLIENT_OID_CHARS),
            outcome: item.outcome,
        })?;
    }
    list.end()
}
