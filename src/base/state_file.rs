//! Small files in the state folder, replaced as a whole.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;

/// Writes a new file, flushes it, renames it over the old one and flushes the folder.
///
/// # Errors
/// When a step fails. The old file is then still complete.
pub(crate) fn replace(folder: &Path, name: &str, text: &[u8]) -> io::Result<()> {
    let new = folder.join(format!("{name}.new"));
    // An interrupted write or another user can have left something here: a link would redirect the write, and a file would
    // keep its owner and mode.
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut options = File::options();
    options.create_new(true).write(true).mode(0o600);
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    let mut file = options.open(&new)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&new, folder.join(name))?;
    File::open(folder)?.sync_all()
}
