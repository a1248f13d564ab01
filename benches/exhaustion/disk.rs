//! Disks for the audit log that are full or hang on demand. Mounting them requires root.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A mounted file system; dropping it unmounts it.
struct Mounted(PathBuf);

impl Mounted {
    fn new(folder: &Path, kind: &str, options: &CStr) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("credbroker-test", folder, kind, flags, options)?;
        Ok(Self(folder.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A disk of 8 MiB that can be filled.
pub(crate) struct SmallDisk(Mounted);

impl SmallDisk {
    pub(crate) fn mount(folder: &Path) -> io::Result<Self> {
        Mounted::new(folder, "tmpfs", c"size=96m").map(Self)
    }

    pub(crate) fn fill(&self) {
        let mut ballast = File::create(self.0.0.join("ballast")).unwrap();
        for size in [4096, 1] {
            while ballast
                .write(&vec![0; size])
                .is_ok_and(|written| written > 0)
            {}
        }
    }

    pub(crate) fn make_room(&self) {
        let _ = std::fs::remove_file(self.0.0.join("ballast"));
    }
}

/// A disk that answers no request while it hangs: files in memory behind FUSE, whose writes return once this process has
/// answered them.
pub(crate) struct HangingDisk {
    gate: Arc<Gate>,
    _mounted: Mounted,
}

#[derive(Default)]
struct Gate {
    /// Whether the disk hangs, and how many requests it has kept waiting.
    state: Mutex<(bool, u64)>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, hangs: bool) {
        self.state.lock().unwrap().0 = hangs;
        self.changed.notify_all();
    }

    /// Waits until the disk does not hang.
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += u64::from(state.0);
        drop(self.changed.wait_while(state, |state| state.0).unwrap());
    }
}

impl HangingDisk {
    pub(crate) fn mount(folder: &Path) -> io::Result<Self> {
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse")?;
        let descriptor = device.as_raw_fd();
        let options = format!("fd={descriptor},rootmode=40000,user_id=0,group_id=0");
        let mounted = Mounted::new(folder, "fuse", &CString::new(options)?)?;
        let gate = Arc::<Gate>::default();
        let of_server = Arc::clone(&gate);
        std::thread::spawn(move || Server::default().run(&device, &of_server));
        Ok(Self {
            gate,
            _mounted: mounted,
        })
    }

    pub(crate) fn hang(&self, hangs: bool) {
        self.gate.set(hangs);
    }

    /// How many requests it has kept waiting.
    pub(crate) fn kept_waiting(&self) -> u64 {
        self.gate.state.lock().unwrap().1
    }
}

impl Drop for HangingDisk {
    fn drop(&mut self) {
        self.hang(false);
    }
}

/// The longest write, and the longest request in bytes.
const MAX_WRITE: u32 = 128 * 1024;
const MAX_REQUEST: usize = 1 << 20;

/// Node id of the only folder; those of files follow.
const ROOT: u64 = 1;

/// The files: node id to content, and name to node id.
#[derive(Default)]
struct Server {
    contents: BTreeMap<u64, Vec<u8>>,
    names: BTreeMap<Vec<u8>, u64>,
}

/// Errors of the kernel's interface, as it expects them.
const NO_ENTRY: i32 = -2;
const NOT_IMPLEMENTED: i32 = -38;

/// What a request gets: an answer, an error, or nothing.
type Answer = Option<Result<Vec<u8>, i32>>;

impl Server {
    /// Answers requests until the file system is unmounted. The structures are those of `linux/fuse.h`, version 7.31.
    fn run(&mut self, mut device: &File, gate: &Gate) {
        let mut buffer = vec![0; MAX_REQUEST];
        loop {
            let length = match device.read(&mut buffer) {
                Ok(length) => length,
                // Unmounted.
                Err(error) if error.raw_os_error() == Some(19) => return,
                Err(_) => continue,
            };
            let request = &buffer[..length];
            gate.pass();
            let Some(answer) = self.answer(u32_at(request, 4), u64_at(request, 16), &request[40..])
            else {
                continue;
            };
            let (error, body) = match answer {
                Ok(body) => (0, body),
                Err(error) => (error, Vec::new()),
            };
            let length = u32::try_from(16 + body.len()).unwrap();
            let mut bytes = length.to_ne_bytes().to_vec();
            bytes.extend(error.to_ne_bytes());
            bytes.extend(u64_at(request, 8).to_ne_bytes());
            bytes.extend(body);
            // Fails if the caller was killed meanwhile.
            let _ = device.write(&bytes);
        }
    }

    fn answer(&mut self, operation: u32, node: u64, input: &[u8]) -> Answer {
        Some(match operation {
            // LOOKUP
            1 => match self.names.get(name(input)) {
                Some(&node) => Ok(self.entry(node)),
                None => Err(NO_ENTRY),
            },
            // FORGET, INTERRUPT, BATCH_FORGET
            2 | 36 | 42 => return None,
            // GETATTR
            3 => Ok(self.attributes_answer(node)),
            // SETATTR, of which only the size is applied
            4 => {
                if u32_at(input, 0) & 8 != 0 {
                    self.content(node).resize(usize_at(input, 16), 0);
                }
                Ok(self.attributes_answer(node))
            }
            // OPEN, OPENDIR
            14 | 27 => Ok(vec![0; 16]),
            // READ
            15 => {
                let (content, at) = (self.content(node), usize_at(input, 8));
                let end = content.len().min(at + u32_at(input, 16) as usize);
                Ok(content.get(at..end).unwrap_or_default().to_vec())
            }
            // WRITE
            16 => {
                let (at, length) = (usize_at(input, 8), u32_at(input, 16));
                let (content, end) = (self.content(node), at + length as usize);
                content.resize(content.len().max(end), 0);
                content[at..end].copy_from_slice(&input[40..40 + length as usize]);
                Ok([length.to_ne_bytes(), [0; 4]].concat())
            }
            // STATFS: a million free blocks
            17 => {
                let blocks = [1_000_000_u64; 5].map(u64::to_ne_bytes).concat();
                let sizes = [4096_u32, 255, 4096].map(u32::to_ne_bytes).concat();
                Ok([blocks, sizes, vec![0; 28]].concat())
            }
            // RELEASE, FSYNC, FLUSH, READDIR (empty), RELEASEDIR, FSYNCDIR
            18 | 20 | 25 | 28 | 29 | 30 => Ok(Vec::new()),
            // INIT
            26 => {
                let start = [7, 31, u32_at(input, 8), 0, 0, MAX_WRITE, 1];
                Ok([start.map(u32::to_ne_bytes).concat(), vec![0; 36]].concat())
            }
            // CREATE
            35 => {
                let next = ROOT + 1 + self.contents.len() as u64;
                let node = *self
                    .names
                    .entry(name(&input[16..]).to_vec())
                    .or_insert(next);
                self.contents.entry(node).or_default();
                Ok([self.entry(node), vec![0; 16]].concat())
            }
            // FALLOCATE
            43 => {
                let end = usize_at(input, 8) + usize_at(input, 16);
                let content = self.content(node);
                content.resize(content.len().max(end), 0);
                Ok(Vec::new())
            }
            _ => Err(NOT_IMPLEMENTED),
        })
    }

    fn content(&mut self, node: u64) -> &mut Vec<u8> {
        self.contents.entry(node).or_default()
    }

    fn entry(&self, node: u64) -> Vec<u8> {
        let head = [node, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
        [head, self.attributes(node)].concat()
    }

    fn attributes_answer(&self, node: u64) -> Vec<u8> {
        [vec![0; 16], self.attributes(node)].concat()
    }

    fn attributes(&self, node: u64) -> Vec<u8> {
        let size = self.contents.get(&node).map_or(0, Vec::len) as u64;
        let mode = if node == ROOT { 0o040_700 } else { 0o100_600 };
        let wide = [node, size, size.div_ceil(512), 0, 0, 0];
        // Three parts of seconds, mode, links, owner, group, device, block size, flags.
        let narrow = [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0_u32];
        [
            wide.map(u64::to_ne_bytes).concat(),
            narrow.map(u32::to_ne_bytes).concat(),
        ]
        .concat()
    }
}

/// The name at the start of these bytes, which a NUL ends.
fn name(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn usize_at(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64_at(bytes, at)).unwrap()
}
