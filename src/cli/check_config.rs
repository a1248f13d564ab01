//! `credbroker check-config`: reports all problems at once, each with its key and the fix.

use std::path::Path;

use super::text::counted;
use super::{DONE, USAGE, read_config, say, say_problems};
use crate::clock::Clock;
use crate::config::load::{Loaded, load};
use crate::config::permissions;

pub(super) fn run(file: &Path) -> u8 {
    let now_ms = Clock::system().wall_ms();
    let loaded = read_config(file).and_then(|config| {
        let open = permissions::warnings(&permissions::files(&config));
        Ok((load(&config, now_ms)?, open))
    });
    match loaded {
        Ok((loaded, open)) => {
            let Loaded {
                policy, warnings, ..
            } = loaded;
            for warning in warnings.iter().chain(&open) {
                say(&format!("warning: {warning}"));
            }
            say(&format!(
                "{}: no problems; {}",
                file.display(),
                counted(policy.accounts().count(), "account")
            ));
            DONE
        }
        Err(problems) => {
            say_problems(&problems, "run `credbroker check-config` to check");
            USAGE
        }
    }
}
