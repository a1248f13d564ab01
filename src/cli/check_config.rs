//! `credbroker check-config`: reports all problems at once, each with its key and the fix.

use std::path::Path;

use super::text::counted;
use super::{DONE, USAGE, read_config, say, say_problems};
use crate::clock::Clock;
use crate::config::load::{Loaded, load};
use crate::config::permissions;
use crate::process::max_descriptors;
use crate::server::descriptors::Shortage;

pub(super) fn run(file: &Path) -> u8 {
    let now_ms = Clock::system().wall_ms();
    let loaded = read_config(file).and_then(|config| {
        let open = permissions::warnings(&permissions::files(&config));
        let shortage = Shortage::find(&config.admission_limits, max_descriptors());
        Ok((load(&config, now_ms)?, open, shortage))
    });
    match loaded {
        Ok((loaded, open, shortage)) => {
            let Loaded {
                policy, warnings, ..
            } = loaded;
            for warning in warnings.iter().chain(&open) {
                say(&format!("warning: {warning}"));
            }
            if let Some(shortage) = shortage {
                say(&format!(
                    "warning: a broker started from this shell {}; a service may have other limits\nfix: {}",
                    shortage.cause(),
                    shortage.fix()
                ));
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
