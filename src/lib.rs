//! credbroker
