//! The audit file and its rotated predecessors.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use flate2::read::MultiGzDecoder;

use super::LONGEST_LINE;
use super::line::Line;

/// Bytes at the end of the audit file that have its last line.
const LAST_BYTES: u64 = 256 * 1024;

/// How often the files are listed again if they are rotated meanwhile.
const LISTINGS: usize = 10;

/// The files to read, the oldest first.
pub(super) struct Files {
    pub(super) opened: Vec<(i64, PathBuf, File)>,
    /// Device and number of each file that was found.
    pub(super) found: BTreeSet<(u64, u64)>,
    /// Whether there is a file from before the time that matters.
    pub(super) reaches_back: bool,
    /// Files that cannot be read.
    pub(super) unreadable: Vec<(PathBuf, io::Error)>,
}

impl Files {
    /// Lists and opens the audit file and its rotated predecessors. Repeats that if they are rotated meanwhile.
    pub(super) fn list(audit_file: &Path, from_ms: i64) -> Self {
        let mut files = Self::list_once(audit_file, from_ms);
        for _ in 0..LISTINGS {
            let again = Self::list_once(audit_file, from_ms);
            let is_unchanged = again.found == files.found;
            files = again;
            if is_unchanged && files.unreadable.is_empty() {
                break;
            }
        }
        files.opened.sort_by_key(|(first_ms, ..)| *first_ms);
        files
    }

    fn list_once(audit_file: &Path, from_ms: i64) -> Self {
        let mut files = Self {
            opened: Vec::new(),
            found: BTreeSet::new(),
            reaches_back: false,
            unreadable: Vec::new(),
        };
        // The name can be a link to another folder.
        let target = std::fs::canonicalize(audit_file).unwrap_or_else(|_| audit_file.to_owned());
        for path in [audit_file, &target] {
            if let Err(error) = files.add_folder(path, from_ms)
                && error.kind() != io::ErrorKind::NotFound
            {
                files.unreadable.push((path.to_owned(), error));
            }
        }
        files
    }

    /// Adds the files whose names begin with that of the audit file.
    fn add_folder(&mut self, audit_file: &Path, from_ms: i64) -> io::Result<()> {
        let (Some(folder), Some(name)) = (audit_file.parent(), audit_file.file_name()) else {
            return Ok(());
        };
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let is_ours = entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(name.as_encoded_bytes());
            if is_ours && let Err(error) = self.add(&entry.path(), from_ms) {
                self.unreadable.push((entry.path(), error));
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &Path, from_ms: i64) -> io::Result<()> {
        let from = UNIX_EPOCH + Duration::from_millis(from_ms.max(0).unsigned_abs());
        let metadata = std::fs::metadata(path)?;
        // Devices and pipes cannot be read back.
        if !metadata.is_file() || metadata.len() == 0 {
            return Ok(());
        }
        if metadata.modified()? < from {
            self.reaches_back = true;
            return Ok(());
        }
        let file = File::open(path)?;
        let opened = file.metadata()?;
        if !self.found.insert((opened.dev(), opened.ino())) {
            return Ok(());
        }
        let first_ms = first_time(reader(path, File::open(path)?))?;
        self.opened.push((first_ms, path.to_owned(), file));
        Ok(())
    }
}

/// The time of the first line that can be read.
fn first_time(mut reader: impl BufRead) -> io::Result<i64> {
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let read = (&mut reader)
            .take(LONGEST_LINE)
            .read_until(b'\n', &mut bytes)?;
        if read == 0 {
            let problem = "expected audit lines, plain or compressed with gzip";
            return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
        }
        if let Ok(line) = serde_json::from_slice::<Line>(&bytes) {
            return Ok(line.time_ms);
        }
    }
}

/// The time of the last line of the audit file; `None` if it has none.
pub(super) fn last_time(audit_file: &Path) -> io::Result<Option<i64>> {
    let mut file = File::open(audit_file)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let end = file.metadata()?.len();
    file.seek(SeekFrom::Start(end.saturating_sub(LAST_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let lines = bytes.rsplit(|byte| *byte == b'\n');
    let lines = lines.filter_map(|line| serde_json::from_slice::<Line>(line).ok());
    // The time of a line that was cut off can be wrong.
    let mut complete = lines.filter(|line| !line.torn);
    Ok(complete.next().map(|line| line.time_ms))
}

pub(super) fn reader(path: &Path, file: File) -> Box<dyn BufRead> {
    let open = BufReader::with_capacity(256 * 1024, file);
    if path.extension() == Some(OsStr::new("gz")) {
        return Box::new(BufReader::with_capacity(
            256 * 1024,
            MultiGzDecoder::new(open),
        ));
    }
    Box::new(open)
}
