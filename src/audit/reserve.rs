//! The reserve file: keeps audit lines that cannot be written to the audit file, with space that is allocated in advance.
//!
//! It holds lines from its start up to the first zero byte.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, OFlags, fallocate};

/// Bytes at the end of the audit file that are searched for the lines of the reserve file.
const SEARCHED: u64 = 64 * 1024 * 1024;

/// The open reserve file.
#[derive(Debug)]
pub(super) struct Reserve {
    file: File,
    size: usize,
    used: usize,
    /// Whether a write may have left more than the `used` bytes.
    is_dirty: bool,
}

impl Reserve {
    /// Opens the file, creates it if it is missing, and allocates its space. Returns the complete lines in it, too.
    ///
    /// # Errors
    /// When it cannot be opened or read, or there is no space.
    pub(super) fn open(path: &Path, size: usize) -> io::Result<(Self, Vec<String>)> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600);
        // A symbolic link would make the broker write another file.
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let file = options.open(path)?;
        fallocate(&file, FallocateFlags::empty(), 0, size as u64)?;
        let mut content = Vec::new();
        BufReader::new(&file).read_until(0, &mut content)?;
        if content.last() == Some(&0) {
            content.pop();
        }
        let lines = content.split_inclusive(|byte| *byte == b'\n');
        // The last line can be cut off if the process was killed; nobody waits for it.
        let is_complete = |line: &&[u8]| {
            line.ends_with(b"\n") && serde_json::from_slice::<serde::de::IgnoredAny>(line).is_ok()
        };
        let lines = lines.filter(is_complete);
        let lines = lines.map(|line| String::from_utf8_lossy(line).into_owned());
        let lines = lines.collect();
        // The next line must not continue one that was cut off.
        let used = content.iter().rposition(|byte| *byte == b'\n');
        let used = used.map_or(0, |end| end + 1);
        if used < content.len() {
            file.write_all_at(&[0], used as u64)?;
        }
        let is_dirty = false;
        let reserve = Self {
            file,
            size,
            used,
            is_dirty,
        };
        Ok((reserve, lines))
    }

    /// Whether it holds lines.
    pub(super) fn is_used(&self) -> bool {
        self.used > 0 || self.is_dirty
    }

    /// Adds lines.
    ///
    /// # Errors
    /// When they do not fit, or cannot be written.
    pub(super) fn append(&mut self, lines: &str) -> io::Result<()> {
        if self.used + lines.len() >= self.size {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                format!("it is full ({} bytes, audit.reserve_bytes)", self.size),
            ));
        }
        let end = self.used + lines.len();
        self.is_dirty = true;
        // With the zero byte first, a line that is cut off does not run into older text.
        self.file.write_all_at(&[0], end as u64)?;
        self.file.write_all_at(lines.as_bytes(), self.used as u64)?;
        self.used = end;
        self.is_dirty = false;
        Ok(())
    }

    /// Removes all lines.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn clear(&mut self) -> io::Result<()> {
        self.file.write_all_at(&[0], 0)?;
        (self.used, self.is_dirty) = (0, false);
        Ok(())
    }

    /// Flushes it to the disk. A failure is not reported: the lines are also in memory.
    pub(super) fn sync(&self) {
        let _ = self.file.sync_data();
    }
}

/// The lines that are not yet at the end of the audit file: the broker may have ended between writing them there and clearing the
/// reserve file.
pub(super) fn missing_from(audit_file: &Path, mut lines: Vec<String>) -> io::Result<Vec<String>> {
    if lines.is_empty() || !audit_file.metadata()?.is_file() {
        return Ok(lines);
    }
    let mut file = File::open(audit_file)?;
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(SEARCHED)))?;
    let wanted: HashSet<Vec<u8>> = lines.iter().map(|line| line.clone().into_bytes()).collect();
    let (mut reader, mut line, mut found) = (
        BufReader::new(file.take(SEARCHED)),
        Vec::new(),
        HashSet::new(),
    );
    while reader.read_until(b'\n', &mut line)? > 0 {
        if wanted.contains(&line) {
            found.insert(std::mem::take(&mut line));
        }
        line.clear();
    }
    lines.retain(|line| !found.contains(line.as_bytes()));
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4096;

    fn open(path: &Path) -> (Reserve, Vec<String>) {
        Reserve::open(path, SIZE).unwrap()
    }

    #[test]
    fn complete_lines_are_found_again_and_older_text_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.reserve");
        let (mut reserve, found) = open(&path);
        assert!(found.is_empty() && !reserve.is_used());
        reserve.append("{\"a\":1}\n{\"a\":2}\n").unwrap();
        reserve.append("{\"a\":3}\n").unwrap();
        let (mut reserve, found) = open(&path);
        assert_eq!(found, ["{\"a\":1}\n", "{\"a\":2}\n", "{\"a\":3}\n"]);
        reserve.clear().unwrap();
        assert!(open(&path).1.is_empty());
        reserve.append("{\"b\":1}\n").unwrap();
        reserve.append("{\"cut").unwrap();
        let (mut reserve, found) = open(&path);
        assert_eq!(found, ["{\"b\":1}\n"]);
        assert!(
            reserve.is_used(),
            "the line that was cut off is removed later"
        );
        reserve.append("{\"b\":2}\n").unwrap();
        assert_eq!(open(&path).1, ["{\"b\":1}\n", "{\"b\":2}\n"]);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 4096);
    }

    #[test]
    fn lines_that_do_not_fit_are_an_error_and_the_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.reserve");
        let (mut reserve, _) = open(&path);
        let line = format!("{{\"a\":\"{}\"}}\n", "x".repeat(1000));
        for _ in 0..4 {
            reserve.append(&line).unwrap();
        }
        let error = reserve.append(&line).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert_eq!(open(&path).1.len(), 4);
    }

    #[test]
    fn symbolic_link_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("link"), folder.path().join("other"));
        std::os::unix::fs::symlink(&other, &path).unwrap();
        Reserve::open(&path, SIZE).unwrap_err();
        assert!(!other.exists());
    }

    #[test]
    fn lines_that_are_already_in_the_audit_log_are_not_added_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.jsonl");
        std::fs::write(&path, "{\"a\":0}\n{\"a\":1}\n{\"a\":2}\n{\"a\":3").unwrap();
        let lines = |numbers: &[u8]| -> Vec<String> {
            let line = |number| format!("{{\"a\":{number}}}\n");
            numbers.iter().map(line).collect()
        };
        let missing = missing_from(&path, lines(&[1, 2, 3, 4])).unwrap();
        assert_eq!(missing, lines(&[3, 4]));
        let device = Path::new("/dev/null");
        assert_eq!(missing_from(device, lines(&[1])).unwrap(), lines(&[1]));
    }
}
