//! A guest in a folder: one file for each RAM block, the rest of its stream, and a manifest.
//!
//! ```text
//! DIR/manifest.json     what is here and in which state (format version 1)
//! DIR/ram-000.bin ...   one file a block, in stream order; pages that never came are holes
//! DIR/early.bin         sections between block list and first page, as they came
//! DIR/tail.bin          device sections and VM description, as they came
//! DIR/lock              held while a process works on the folder
//! ```
//!
//! The source releases its guest when it receives success, so success is sent only after everything is on the disk and
//! the manifest with the state `whole` has been renamed into place.

mod custody;
mod incoming;
mod kept;
mod mapped_file;
mod private;
mod ram_file;
mod stored;

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::common::human_bytes;
use ramwire::stream::qemu::section::Framing;

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

pub use custody::Custody;
pub use incoming::IncomingGuest;
pub use stored::{Block, DOUBT_PASSED, Overrides, StoredGuest, has_room, keep, may_keep};

/// Version of the folder's format that this program writes and reads.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
const EARLY: &str = "early.bin";
const TAIL: &str = "tail.bin";
const LOCK: &str = "lock";

/// State of a folder's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// A migration is arriving, or was interrupted.
    Arriving,
    /// Everything has arrived; the guest runs nowhere.
    Whole,
    /// Everything has arrived, but the device state ended without the VM description that proves it complete.
    Incomplete,
    /// Being sent.
    Sending,
    /// It runs at another place.
    Sent,
    /// It may run at another host.
    InDoubt,
}

/// As the manifest spells it.
impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// One RAM block in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockEntry {
    /// Position in the stream's list.
    pub index: u32,
    /// Name.
    pub name: String,
    /// File in the folder.
    pub file: String,
    /// Bytes.
    pub used_length: u64,
    /// Guest physical address, if the stream announced one.
    pub guest_addr: Option<u64>,
    /// Both ends map its memory (`x-ignore-shared`): it is not in the folder, and is not sent.
    #[serde(default)]
    pub ignored: bool,
}

/// Content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format: u32,
    /// Its state.
    pub state: State,
    /// While it is being sent or in doubt: the state to restore on failure, if it is not `whole`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub otherwise: Option<State>,
    /// Its RAM files are mapped by the destination that it is sent to, or was sent to last.
    #[serde(default, skip_serializing_if = "is_not")]
    pub passed: bool,
    /// Machine name.
    pub machine: String,
    /// Validated capabilities.
    pub capabilities: Vec<String>,
    /// UUID of the VM, in hex, if the stream announced one.
    pub uuid: Option<String>,
    /// Target page size, if the stream announced one.
    pub page_size: Option<u64>,
    /// Its stream has a configuration section.
    #[serde(default = "present")]
    pub configuration: bool,
    /// Its sections have footers.
    #[serde(default = "present")]
    pub footers: bool,
    /// The kind of source: `qemu` or `ramwire`.
    pub source: String,
    /// The style that its stream has shown, if the machine's name does not show it, as `--peer` writes it.
    #[serde(default)]
    pub peer_style: Option<String>,
    /// The blocks in stream order.
    pub blocks: Vec<BlockEntry>,
}

/// Older folders without this field hold guests that have both.
fn present() -> bool {
    true
}

/// For what is written only if it is so.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_not(flag: &bool) -> bool {
    !flag
}

impl Manifest {
    /// The guest's state if the destination that it was last handed to does not run it.
    pub fn unless_given(&self) -> State {
        match self.state {
            State::Sending | State::InDoubt => self.otherwise.unwrap_or(State::Whole),
            state => state,
        }
    }

    /// The same guest, in `state` now.
    pub fn in_state(&self, state: State) -> Self {
        let open = matches!(state, State::Sending | State::InDoubt);
        let otherwise = Some(self.unless_given()).filter(|otherwise| open && *otherwise != State::Whole);
        Self { state, otherwise, ..self.clone() }
    }

    /// Whether its stream has a configuration section and footers.
    pub fn framing(&self) -> Framing {
        Framing { configuration: self.configuration, footers: self.footers }
    }
}

/// Why a folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The kernel's error.
    #[error("{path}: {doing}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The failed operation.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// An open folder that may be used for other purposes.
    #[error(
        "{path} is open to others (mode {mode:04o}) and {}; name a folder of its own{}",
        foreign.as_ref().map_or("meant to be shared".to_owned(), |name| format!("holds {name:?}, which is no guest's")),
        if *may_close { format!(", or close it with `chmod 700 {}`", path.display()) } else { String::new() }
    )]
    Shared {
        /// The folder.
        path: PathBuf,
        /// Its mode.
        mode: u32,
        /// A file in it that is not ours.
        foreign: Option<String>,
        /// It is not needed by other users, as far as can be determined.
        may_close: bool,
    },
    /// Pages of unknown blocks are refused.
    #[error(
        "the source leaves shared RAM blocks out (x-ignore-shared): say which of {blocks} they are by --ignore-shared"
    )]
    LeftOut {
        /// Names of all blocks.
        blocks: String,
    },
    /// A block that is to be left out does not belong to the guest.
    #[error("no RAM block is called {name:?}; the source has {blocks}")]
    NoSuchBlock {
        /// The name.
        name: String,
        /// Names of all blocks.
        blocks: String,
    },
    /// A file that was given for a block has none to stand for.
    #[error("--ram {name}: {why}; the folder has {blocks}")]
    NotReplaced {
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
        /// Names of the blocks whose pages are in the folder.
        blocks: String,
    },
    /// Guest memory is not written through links or to devices.
    #[error("{path} is {is}, not a file of this folder's own; remove it")]
    NotPlain {
        /// Where.
        path: PathBuf,
        /// What is there.
        is: &'static str,
    },
    /// The guest does not fit.
    #[error("{path}: the guest has {} of RAM, and {} are free {of}", human_bytes(*ram), human_bytes(*room))]
    NoRoom {
        /// The folder.
        path: PathBuf,
        /// Bytes of RAM.
        ram: u64,
        /// Bytes that are free.
        room: u64,
        /// Of what.
        of: String,
    },
    /// A RAM file is no longer the one that the guest was received into.
    #[error(
        "{path} was {what} while the guest arrived; keep other programs out of the folder and receive again"
    )]
    Changed {
        /// The file.
        path: PathBuf,
        /// What happened to it.
        what: &'static str,
    },
    /// Another process works on it.
    #[error("{path} is in use by another ramwire; wait for it to end")]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// It holds a guest already.
    #[error("{path} holds a guest already (state {state}); name an empty folder")]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// State of that guest.
        state: State,
    },
    /// Not a manifest of ours.
    #[error("{path} can't be read as a manifest: {why}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The guest must not be sent.
    #[error("{path}: the guest is {state}: {why}")]
    NotWhole {
        /// The folder.
        path: PathBuf,
        /// Its state.
        state: State,
        /// What to do.
        why: &'static str,
    },
}

/// A folder that this process holds the lock of.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    _lock: File,
}

impl Store {
    /// Locks the folder; creates it (mode 0700) if it does not exist, and removes access for other users.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Locked`], [`StoreError::Shared`], [`StoreError::NotPlain`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        private::folder(path)?;
        let lock_path = path.join(LOCK);
        let lock = private::lock_file(&lock_path)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(StoreError::Locked { path: path.to_owned() }),
            Err(errno) => Err(failed(&lock_path, "locking")(errno.into())),
        }
    }

    /// Whether the folder has a manifest, without making or locking anything.
    pub fn has_manifest(path: &Path) -> bool {
        fs::symlink_metadata(path.join(MANIFEST)).is_ok()
    }

    /// A file of the folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The manifest; `None` in a folder without one.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Manifest`].
    pub fn manifest(&self) -> Result<Option<Manifest>, StoreError> {
        let path = self.file(MANIFEST);
        let mut text = String::new();
        match private::plain(&path, OpenOptions::new().read(true)) {
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            other => other?.read_to_string(&mut text).map_err(failed(&path, "reading"))?,
        };
        let manifest: Manifest = serde_json::from_str(&text)
            .map_err(|error| StoreError::Manifest { path: path.clone(), why: error.to_string() })?;
        if manifest.format != FORMAT {
            let why = format!("format {} is not known, only {FORMAT} is", manifest.format);
            return Err(StoreError::Manifest { path, why });
        }
        Ok(Some(manifest))
    }

    /// Replaces the manifest: writes it to a temporary file, syncs, renames, and syncs the folder.
    ///
    /// # Errors
    /// [`StoreError::Io`]; the old manifest is then still there.
    pub fn put_manifest(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let mut text = serde_json::to_string_pretty(manifest)
            .map_err(|error| StoreError::Manifest { path: self.file(MANIFEST), why: error.to_string() })?;
        text.push('\n');
        self.put(MANIFEST, text.as_bytes())
    }

    /// Removes the manifest, if there is one.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn remove_manifest(&self) -> Result<(), StoreError> {
        let path = self.file(MANIFEST);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed.map_err(failed(&path, "removing")),
        }
    }

    /// Replaces a file durably.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn put(&self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let aside = self.file(&format!("{name}.new"));
        let mut file = private::create(&aside)?;
        file.write_all(bytes).map_err(failed(&aside, "writing"))?;
        file.sync_all().map_err(failed(&aside, "syncing"))?;
        let path = self.file(name);
        fs::rename(&aside, &path).map_err(failed(&path, "renaming into place"))?;
        self.sync_folder()
    }

    fn sync_folder(&self) -> Result<(), StoreError> {
        let folder = File::open(&self.path).map_err(failed(&self.path, "opening"))?;
        folder.sync_all().map_err(failed(&self.path, "syncing"))
    }
}

fn failed<'p>(path: &'p Path, doing: &'static str) -> impl FnOnce(io::Error) -> StoreError + 'p {
    move |source| StoreError::Io { path: path.to_owned(), doing, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    pub(super) fn manifest(state: State) -> Manifest {
        Manifest {
            format: FORMAT,
            state,
            otherwise: None,
            passed: false,
            machine: "none".into(),
            capabilities: Vec::new(),
            uuid: None,
            page_size: None,
            configuration: true,
            footers: true,
            source: "qemu".into(),
            peer_style: None,
            blocks: Vec::new(),
        }
    }

    #[test]
    fn a_folder_is_private_locked_and_keeps_its_manifest() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("guest");
        let store = Store::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        assert!(store.manifest().unwrap().is_none());
        store.put_manifest(&manifest(State::Whole)).unwrap();
        let mode = fs::metadata(path.join(MANIFEST)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(matches!(Store::open(&path), Err(StoreError::Locked { .. })));
        drop(store);
        assert_eq!(Store::open(&path).unwrap().manifest().unwrap(), Some(manifest(State::Whole)));
    }

    #[test]
    fn a_folder_without_a_guest_is_not_sent_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let (missing, empty) = (dir.path().join("missing"), dir.path().join("empty"));
        fs::DirBuilder::new().create(&empty).unwrap();
        let mode = || fs::metadata(&empty).unwrap().permissions().mode();
        let before = mode();
        for path in [&missing, &empty] {
            let opened = StoredGuest::open(path, &[], Overrides::default());
            assert!(matches!(opened.map(|_| ()), Err(StoreError::Manifest { .. })));
        }
        assert!(!missing.exists() && fs::read_dir(&empty).unwrap().next().is_none() && mode() == before);
    }

    #[test]
    fn a_manifest_of_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        for text in ["", "{}", "[1]", "\0\u{1}"] {
            store.put(MANIFEST, text.as_bytes()).unwrap();
            assert!(matches!(store.manifest(), Err(StoreError::Manifest { .. })), "{text:?}");
        }
        store.put_manifest(&Manifest { format: 9, ..manifest(State::Whole) }).unwrap();
        assert!(matches!(store.manifest(), Err(StoreError::Manifest { .. })));
    }
}
