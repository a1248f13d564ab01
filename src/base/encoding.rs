//! Encoding of text files.

use std::io;

/// Whether these bytes are UTF-16, with or without a byte order mark. Without one, a NUL byte decides: UTF-8 text has none.
pub(crate) fn is_utf16(bytes: &[u8]) -> bool {
    bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) || bytes.contains(&0)
}

/// A file's bytes as text.
///
/// # Errors
/// If they are not UTF-8.
pub(crate) fn text(bytes: &[u8]) -> io::Result<&str> {
    if is_utf16(bytes) {
        let problem = "it is UTF-16, which PowerShell's `>` writes; save it as UTF-8";
        return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    }
    str::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
