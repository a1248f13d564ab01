//! The `credbroker` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    credbroker::cli::run()
}
