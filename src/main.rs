//! credbroker command line.
fn main() {}
