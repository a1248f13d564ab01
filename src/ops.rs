//! Operations other than calls of bots: key tests, cancelling all orders, key health, readiness and gauges.

pub(crate) mod cancel_all;
pub(crate) mod health;
pub(crate) mod key_health;
pub(crate) mod key_test;
