//! The audit file: appends lines, and completes one that was cut off.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use serde::Serialize;

use super::VERSION;
use crate::clock::Clock;

/// Upper bound for the length of a line: of the longest ones, with many ids and a target of a few kilobytes.
const MAX_LINE_BYTES: u64 = 128 * 1024;

/// The line that marks the previous one as incomplete.
#[derive(Serialize)]
struct TornLine<'a> {
    v: u8,
    event: &'static str,
    time_ms: i64,
    run: &'a str,
    detail: &'static str,
}

/// Opens the file for appending; creates it if it is missing.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

/// The open audit file.
#[derive(Debug)]
pub(super) struct AuditFile {
    pub(super) file: File,
    /// Whether the file ends in an incomplete line.
    torn: bool,
    /// Whether the file system can write without waiting, as far as is known.
    writes_at_once: bool,
}

impl AuditFile {
    /// Opens `path`.
    ///
    /// # Errors
    /// When it cannot be opened or read.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = open(path)?;
        // A crash can leave an incomplete line. Devices and pipes have no end to read.
        let torn = file.metadata()?.is_file() && !unfinished(&file)?.is_empty();
        Ok(Self {
            file,
            torn,
            writes_at_once: true,
        })
    }

    /// Appends a line, which ends with a line feed, unless that could wait for the disk. Returns whether all of it was written.
    ///
    /// ext4 and tmpfs never write in this way; xfs and btrfs do. Source: pwritev2(2), `RWF_NOWAIT`.
    pub(super) fn append_at_once(&mut self, line: &str) -> bool {
        /// Append, whatever the offset. Source: pwritev2(2).
        const END: u64 = u64::MAX;
        if self.torn || !self.writes_at_once {
            return false;
        }
        let bytes = [IoSlice::new(line.as_bytes())];
        match pwritev2(&self.file, &bytes, END, ReadWriteFlags::NOWAIT) {
            Ok(written) => {
                // The rest of a line that was cut off is completed like any other.
                self.torn = written > 0 && written < line.len();
                written == line.len()
            }
            Err(error) => {
                self.writes_at_once = !matches!(error, Errno::OPNOTSUPP | Errno::INVAL);
                false
            }
        }
    }

    /// Appends `lines`, which end with a line feed, and returns how many of their bytes were written. Completes an incomplete
    /// line first.
    pub(super) fn append(
        &mut self,
        lines: &str,
        run: &str,
        clock: &Clock,
    ) -> (usize, io::Result<()>) {
        match self.complete(run, clock) {
            Ok(()) => self.write(lines.as_bytes()),
            Err(error) => (0, Err(error)),
        }
    }

    /// Completes an incomplete line, so that it parses and has `"torn":true`, and adds a line that explains it.
    pub(super) fn complete(&mut self, run: &str, clock: &Clock) -> io::Result<()> {
        if !self.torn {
            return Ok(());
        }
        // Read again, because `doctor` may have completed the line meanwhile.
        let unfinished = unfinished(&self.file)?;
        if unfinished.is_empty() {
            self.torn = false;
            return Ok(());
        }
        let (mut rest, detail) = match rest_of_line(&unfinished) {
            Some(rest) => (
                rest,
                "the previous line was cut off by a full disk or a crash; if it is an intent, look the order up",
            ),
            None => (
                Vec::new(),
                "the previous line is damaged and is not JSON; inspect it in an editor",
            ),
        };
        let marker = serde_json::to_string(&TornLine {
            v: VERSION,
            event: "torn",
            time_ms: clock.wall_ms(),
            run,
            detail,
        })?;
        rest.push(b'\n');
        rest.extend(marker.as_bytes());
        rest.push(b'\n');
        self.write(&rest).1
    }

    /// Writes bytes that end with a line feed; returns how many were written.
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut rest = bytes;
        while !rest.is_empty() {
            let written = bytes.len() - rest.len();
            match self.file.write(rest) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    let (done, left) = rest.split_at_checked(written).unwrap_or((rest, &[]));
                    self.torn = !done.ends_with(b"\n");
                    rest = left;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (bytes.len(), Ok(()))
    }
}

/// The bytes after the last line feed of a file.
fn unfinished(mut file: &File) -> io::Result<Vec<u8>> {
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_LINE_BYTES)))?;
    let mut end = Vec::new();
    file.take(MAX_LINE_BYTES).read_to_end(&mut end)?;
    if let Some(line_feed) = end.iter().rposition(|byte| *byte == b'\n') {
        end.drain(..=line_feed);
    }
    Ok(end)
}

/// The bytes that complete a line, cut off at any byte, to a JSON object with `"torn":true`. Empty for a complete object;
/// `None` if the line is not the start of an object.
fn rest_of_line(line: &[u8]) -> Option<Vec<u8>> {
    /// Endings that complete a truncated UTF-8 character (RFC 3629, section 4).
    const CHARACTER_ENDS: [&[u8]; 6] = [
        b"",
        b"\x80",
        b"\x80\x80",
        b"\x80\x80\x80",
        b"\xa0\x80",
        b"\x90\x80\x80",
    ];
    /// Endings that complete a truncated value, or a name and its value; the last ones are for `null`, `true` and `false`.
    const VALUE_ENDS: [&str; 16] = [
        "", "\"", "\":0", ":0", "0", "\\\"", "0000\"", "ull", "ll", "l", "rue", "ue", "e", "alse",
        "lse", "se",
    ];
    let is_object = |text: &[u8]| serde_json::from_slice::<serde_json::Map<_, _>>(text).is_ok();
    if is_object(line) {
        return Some(Vec::new());
    }
    let (mut open, mut in_string, mut escaped) = (Vec::new(), false, false);
    for byte in line {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' if !in_string => open.push(b'}'),
            b'[' if !in_string => open.push(b']'),
            b'}' | b']' if !in_string => {
                open.pop();
            }
            _ => {}
        }
    }
    // The outermost brace is in `mark`.
    let inner = open.get(1..)?.iter().rev();
    for character in CHARACTER_ENDS {
        for value in VALUE_ENDS {
            for mark in [",\"torn\":true}", "\"torn\":true}"] {
                let mut rest = character.to_vec();
                rest.extend(value.as_bytes());
                rest.extend(inner.clone());
                rest.extend(mark.as_bytes());
                if is_object(&[line, &rest].concat()) {
                    return Some(rest);
                }
            }
        }
    }
    None
}
