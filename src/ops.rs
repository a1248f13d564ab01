//! What the broker does and says besides calls: tests of keys, cancelling everything, how it is.

pub mod cancel_all;
pub mod health;
pub mod key_health;
pub mod key_test;
