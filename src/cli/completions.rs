//! `credbroker completions`: shell completions of commands and options.

use clap_complete::Shell;

use super::{DONE, command, show};

pub(super) fn run(shell: Shell) -> u8 {
    let mut command = command();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, name, &mut script);
    show(&String::from_utf8_lossy(&script), DONE)
}
