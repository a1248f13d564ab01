//! How a text file was saved.

use std::io;

/// Whether these bytes are UTF-16, with a byte order mark or without: no text in UTF-8 that anybody writes holds a NUL.
pub(crate) fn is_utf16(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) || bytes.contains(&0)
}

/// A file's bytes as text.
///
/// # Errors
/// When they are not UTF-8.
pub(crate) fn text(bytes: &[u8]) -> io::Result<&str> {
    if is_utf16(bytes) {
        let problem = "it is UTF-16, as PowerShell's `>` writes it; save it as UTF-8";
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    str::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
