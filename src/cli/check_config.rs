//! `credbroker check-config`: every problem at once, each with its key and the fix.

use std::path::Path;

use super::text::counted;
use super::{DONE, USAGE, read_config, say, say_problems};
use crate::clock::Clock;
use crate::config::load::{Loaded, load};

pub(super) fn run(file: &Path) -> u8 {
    let now_ms = Clock::system().wall_ms();
    match read_config(file).and_then(|config| load(&config, now_ms)) {
        Ok(Loaded { policy, .. }) => {
            say(&format!(
                "{}: no problems; {}",
                file.display(),
                counted(policy.accounts().count(), "account")
            ));
            DONE
        }
        Err(problems) => {
            say_problems(&problems, "credbroker check-config");
            USAGE
        }
    }
}
