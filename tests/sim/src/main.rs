//! Runs a simulator as a program: `cargo run -p credbroker-sim -- kucoin` or `-- vault`.
fn main() {}
