//! What the broker does and says besides calls: tests of keys, cancelling everything, how it is.

pub(crate) mod cancel_all;
pub(crate) mod health;
pub(crate) mod key_health;
pub(crate) mod key_test;
