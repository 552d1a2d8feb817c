//! A guest in a folder, to be sent on.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ramwire::guest::{DeviceState, GuestControl, GuestMemory, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{Error, Incoming, memory_to_pass};
use ramwire::stream::qemu::file::Configuration;
use ramwire::stream::qemu::section::Framing;
use ramwire::stream::qemu::state::sections_end;
use ramwire::stream::qemu::style::PeerStyle;
use ramwire::sys::{Mapping, SharedFile};
use ramwire::transport::MappedDestination;
use ramwire::units::{BlockIndex, GuestAddr, PageSize};

use super::incoming::nothing;
use super::kept::Kept;
use super::ram_file::{MAX_KEPT_OPEN, check_room};
use super::{Custody, EARLY, IncomingGuest, Manifest, State, Store, StoreError, TAIL, failed, private};
use crate::cli::remedies::in_words;

/// A QEMU maps the greatest length that a RAM block may get, which no stream tells; only those of the ACPI tables may
/// get longer, up to this. The rest of a longer file is a hole.
const MIN_PASSED: u64 = 2 << 20;

/// What to do with a guest in doubt whose memory was passed.
pub const DOUBT_PASSED: &str = "its destination may run it, in the RAM files of this folder; check there first: if it \
    runs or has run there, receive the guest again; if it never did, give --destination-is-dead";

/// What `ramwire send` may do against the manifest.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overrides {
    /// Send a guest that was already sent.
    pub resend: bool,
    /// Send a guest that may run at its destination or its source: an operator confirmed that it does not.
    pub destination_is_dead: bool,
    /// Send a guest whose device state has no VM description.
    pub no_vmdesc: bool,
}

/// A RAM block in a file that the caller gives.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its name.
    pub name: BlockName,
    /// The file; it contains only the block.
    pub path: PathBuf,
}

/// A paused guest: memory in files, and the device state as it was received.
pub struct StoredGuest {
    pub(super) custody: Option<Arc<Custody>>,
    pub(super) manifest: Manifest,
    pub(super) memory: Arc<MappedGuest>,
    pub(super) configuration: Configuration,
    pub(super) early: Vec<u8>,
    pub(super) tail: Vec<u8>,
    /// Locked against writers as long as its memory is mapped.
    pub(super) _file: Option<MappedDestination>,
}

impl StoredGuest {
    /// Opens a folder; `replaced` blocks come from other files.
    ///
    /// # Errors
    /// [`StoreError::NotWhole`] unless the manifest says `whole` or an override allows it.
    pub fn open(path: &Path, replaced: &[Block], overrides: Overrides) -> Result<Self, StoreError> {
        let empty = || {
            let why = "there is no manifest.json; fill the folder with `ramwire receive`".to_owned();
            StoreError::Manifest { path: path.to_owned(), why }
        };
        // A folder that holds no guest, or is not there, is left as it is.
        if !Store::has_manifest(path) {
            return Err(empty());
        }
        let store = Store::open(path)?;
        let manifest = store.manifest()?.ok_or_else(empty)?;
        replaces(&manifest, replaced)?;
        allowed(path, &manifest, overrides)?;
        let early = read(&store.file(EARLY))?;
        let tail = read(&store.file(TAIL))?;
        let page = page_of(&manifest, path)?;
        let mut builder = MappedGuest::builder(page);
        for entry in &manifest.blocks {
            let name = BlockName::new(&entry.name).map_err(|e| unreadable(path, &e))?;
            let mut block = RamBlock::new(name.clone(), entry.used_length);
            block.guest_addr = entry.guest_addr.map(GuestAddr);
            if entry.ignored {
                block.flags.ignored = true;
                builder = builder.mapping(block.clone(), &nothing(&block, path)?);
                continue;
            }
            // Only a plain name of this folder: a manifest must not reach outside it.
            let plain = Path::new(&entry.file).file_name().is_some_and(|f| f == entry.file.as_str());
            let own = store.file(&entry.file);
            let file = replaced.iter().find(|block| block.name == name).map_or(&own, |block| &block.path);
            if !plain {
                return Err(unreadable(path, &format!("file name {:?} is not plain", entry.file)));
            }
            let mapping = mapped(file, Some(entry.used_length), file == &own)?;
            let many = manifest.blocks.len() > MAX_KEPT_OPEN;
            builder = builder.mapping(block, &if many { mapping.detached() } else { mapping });
        }
        let memory = builder.build().map_err(|error| unreadable(path, &error))?;
        let configuration = Configuration {
            machine: manifest.machine.clone(),
            page_size: manifest.page_size.and_then(PageSize::from_bytes),
            capabilities: manifest.capabilities.clone(),
            uuid: manifest.uuid.as_deref().and_then(parse_uuid),
        };
        let custody = Some(Arc::new(Custody::new(store, manifest.clone())));
        Ok(Self { custody, manifest, memory: Arc::new(memory), configuration, early, tail, _file: None })
    }

    /// A guest that consists only of the caller's RAM files: no device state, machine `none`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn of_blocks(blocks: &[Block]) -> Result<Self, StoreError> {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for block in blocks {
            let mapping = mapped(&block.path, None, false)?;
            let mapping = if blocks.len() > MAX_KEPT_OPEN { mapping.detached() } else { mapping };
            builder = builder.mapping(RamBlock::new(block.name.clone(), mapping.region().len()), &mapping);
        }
        let place = blocks.first().map_or(Path::new("."), |block| &block.path);
        let memory = builder.build().map_err(|error| unreadable(place, &error))?;
        let configuration = Configuration { machine: "none".into(), ..Configuration::default() };
        let manifest = Manifest {
            format: super::FORMAT,
            state: State::Whole,
            otherwise: None,
            passed: false,
            machine: "none".into(),
            capabilities: Vec::new(),
            uuid: None,
            page_size: None,
            configuration: true,
            footers: true,
            source: "files".into(),
            peer_style: None,
            blocks: Vec::new(),
        };
        let (early, tail) = (Vec::new(), Vec::new());
        let memory = Arc::new(memory);
        Ok(Self { custody: None, manifest, memory, configuration, early, tail, _file: None })
    }

    /// Its memory.
    pub fn memory(&self) -> Arc<Kept> {
        Arc::new(Kept::new(&self.memory))
    }

    /// Its memory by block, for a process of this host that maps it: the files themselves, each of [`MIN_PASSED`] bytes at
    /// least where that is possible.
    ///
    /// # Errors
    /// [`Error::Passed`]: a block that has no open file of its own.
    pub fn memory_to_pass(&self) -> Result<Vec<(BlockName, SharedFile)>, Error> {
        let memory = memory_to_pass(&*self.memory)?;
        for (name, file) in &memory {
            if file.check(MIN_PASSED).is_err()
                && let Err(errno) = rustix::fs::ftruncate(file.descriptor(), file.start() + MIN_PASSED)
            {
                // A memfd that is sealed has the length that its owner gave it.
                tracing::debug!(block = name.as_str(), %errno, "its file keeps its length");
            }
        }
        Ok(memory)
    }

    /// The configuration that its stream announced.
    pub fn configuration(&self) -> &Configuration {
        &self.configuration
    }

    /// Whether its stream has a configuration section and footers.
    pub fn framing(&self) -> Framing {
        self.manifest.framing()
    }

    /// The style that its source has shown, if the machine's name does not show it.
    pub fn peer_style(&self) -> Option<PeerStyle> {
        self.manifest.peer_style.as_deref().and_then(|name| name.parse().ok())
    }

    /// Sections between block list and first page.
    pub fn early_sections(&self) -> &[u8] {
        &self.early
    }

    /// True if it has device state to send: more than the end of a stream without devices.
    pub fn has_state(&self) -> bool {
        !self.tail.is_empty() && sections_end(&self.tail, self.framing()) != Some(0)
    }

    /// The session's control of this guest, which is always paused.
    pub fn control(&self) -> Box<dyn GuestControl> {
        Box::new(PausedMachine { tail: self.tail.clone(), custody: self.custody() })
    }

    /// Its state in the folder's manifest; `None` for files without a folder.
    pub fn custody(&self) -> Option<Arc<Custody>> {
        self.custody.clone()
    }
}

/// Checks that a guest could be [kept](keep) at `path`: makes the folder, or finds it without a guest.
///
/// # Errors
/// [`StoreError`].
pub fn may_keep(path: &Path) -> Result<(), StoreError> {
    IncomingGuest::new(Store::open(path)?).map(drop)
}

/// Checks that a guest with so much RAM could be [kept](keep) at `path`, as far as its file system has room now.
///
/// # Errors
/// [`StoreError::NoRoom`].
pub fn has_room(path: &Path, ram: u64) -> Result<(), StoreError> {
    check_room(path, ram, false)
}

/// Writes a guest that could not be passed on into a folder of its own. `may_run`: on another host, so that it is in
/// doubt.
///
/// # Errors
/// [`StoreError`].
pub fn keep(
    path: &Path,
    incoming: &Incoming,
    memory: &dyn GuestMemory,
    tail: &[u8],
    may_run: bool,
) -> Result<(), StoreError> {
    use ramwire::session::MemoryProvider;
    let mut guest = IncomingGuest::new(Store::open(path)?)?;
    let failed = |error: &(dyn std::error::Error + 'static)| {
        failed(path, "keeping the guest")(io::Error::other(in_words(error)))
    };
    let kept = guest.provide(incoming).map_err(|error| failed(&error))?;
    let mut window = vec![0u8; 1 << 20];
    for (index, block) in memory.table().blocks().iter().enumerate() {
        let target = kept.table().find(block.name.as_str()).map_err(|error| failed(&error))?;
        let mut offset = 0;
        while offset < block.used_length {
            let len = (window.len() as u64).min(block.used_length - offset);
            let at = ramwire::units::BlockOffset(offset);
            let from = memory.table().admit(BlockIndex(index as u32), at, len).map_err(|e| failed(&e))?;
            let to = kept.table().admit(target, at, len).map_err(|e| failed(&e))?;
            let got = memory.span(from).map_err(|e| failed(&e))?.copy_to(&mut window);
            kept.span(to).map_err(|e| failed(&e))?.copy_from(&window[..got]);
            offset += len;
        }
    }
    guest.arrived(incoming, false);
    guest.load(&mut &tail[..]).map_err(|error| failed(&error))?;
    if may_run {
        guest.doubt();
    }
    guest.resume().map_err(|error| failed(&error))?;
    guest.settle()
}

/// Each of the caller's files stands for one block of the folder.
fn replaces(manifest: &Manifest, replaced: &[Block]) -> Result<(), StoreError> {
    for (index, Block { name, .. }) in replaced.iter().enumerate() {
        let entry = manifest.blocks.iter().find(|entry| entry.name == name.as_str());
        let why = match entry {
            None => "no RAM block has this name",
            Some(entry) if entry.ignored => "both ends share this block, and it is not sent",
            Some(_) if replaced[..index].iter().any(|other| other.name == *name) => "it is given twice",
            Some(_) => continue,
        };
        let blocks: Vec<_> =
            manifest.blocks.iter().filter(|entry| !entry.ignored).map(|entry| &*entry.name).collect();
        return Err(StoreError::NotReplaced { name: name.to_string(), why, blocks: blocks.join(", ") });
    }
    Ok(())
}

/// If the last destination is dead, the guest's previous state counts, and needs its own override.
fn allowed(path: &Path, manifest: &Manifest, overrides: Overrides) -> Result<(), StoreError> {
    let open = manifest.state != manifest.unless_given();
    let state = if overrides.destination_is_dead { manifest.unless_given() } else { manifest.state };
    // Whoever was to map the RAM files has never run the guest: they are as they were before.
    let passed = manifest.passed && !(open && overrides.destination_is_dead);
    let why = match state {
        State::Whole => return Ok(()),
        State::Sent if passed => {
            "it runs elsewhere, in the RAM files of this folder: they are not the guest that arrived any more; receive it again"
        }
        State::Sent if overrides.resend => return Ok(()),
        State::Incomplete if overrides.no_vmdesc => return Ok(()),
        State::Sent if open => {
            "before that it was sent to another destination, where it runs; --resend sends it once more"
        }
        State::Sent => "it runs elsewhere; --resend sends it once more",
        State::InDoubt | State::Sending if passed => DOUBT_PASSED,
        State::InDoubt | State::Sending => {
            "its destination may run it, or the source that it came from; look there first: if one does, delete this \
             folder; if none does, give --destination-is-dead"
        }
        State::Incomplete => "its device state ended without a VM description; --no-vmdesc sends it anyway",
        State::Arriving => "it never arrived; receive it again",
    };
    Err(StoreError::NotWhole { path: path.to_owned(), state, why })
}

/// `own`: a file of the folder, which must not be a link; a caller's own file may be one.
fn mapped(path: &Path, length: Option<u64>, own: bool) -> Result<Mapping, StoreError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let opened = match own {
        true => private::plain(path, &mut options)?,
        false => options.open(path).map_err(failed(path, "opening"))?,
    };
    let length = match length {
        Some(length) => length,
        None => opened.metadata().map_err(failed(path, "looking at"))?.len(),
    };
    Mapping::file(opened.into(), 0, length).map_err(|error| failed(path, "mapping")(io::Error::other(error)))
}

fn read(path: &Path) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    let mut file = private::plain(path, OpenOptions::new().read(true))?;
    file.read_to_end(&mut bytes).map_err(failed(path, "reading"))?;
    Ok(bytes)
}

fn unreadable(path: &Path, why: &dyn std::fmt::Display) -> StoreError {
    StoreError::Manifest { path: path.to_owned(), why: why.to_string() }
}

fn page_of(manifest: &Manifest, path: &Path) -> Result<PageSize, StoreError> {
    let Some(bytes) = manifest.page_size else { return Ok(PageSize::SIZE_4K) };
    PageSize::from_bytes(bytes).ok_or_else(|| unreadable(path, &format!("{bytes} is no page size")))
}

fn parse_uuid(hex: &str) -> Option<[u8; 16]> {
    let value = u128::from_str_radix(hex, 16).ok()?;
    (hex.len() == 32).then(|| value.to_be_bytes())
}

struct PausedMachine {
    tail: Vec<u8>,
    custody: Option<Arc<Custody>>,
}

impl GuestControl for PausedMachine {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    /// Files are mapped here, and their pages are never freed.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }
}

impl DeviceState for PausedMachine {
    fn size(&mut self) -> u64 {
        self.tail.len() as u64
    }

    /// After this the guest may be handed over at any moment.
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        if let Some(custody) = &self.custody {
            custody.mark(State::Sending).map_err(io::Error::other)?;
        }
        out.write_all(&self.tail)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::tests::manifest;
    use super::*;

    /// What was said of the last destination counts for that one only: the guest before it may be sent as it could.
    #[test]
    fn a_guest_that_was_passed_in_vain_is_what_it_was_before() {
        let overrides =
            |resend, destination_is_dead| Overrides { resend, destination_is_dead, no_vmdesc: false };
        let path = Path::new("guest");
        let sent = Manifest { passed: true, ..manifest(State::Sent) };
        let passed = Manifest { passed: true, ..manifest(State::Sent).in_state(State::InDoubt) };
        let first = Manifest { passed: true, ..manifest(State::Whole).in_state(State::InDoubt) };
        for (manifest, overrides, is_allowed) in [
            (&sent, overrides(true, true), false),
            (&passed, overrides(false, false), false),
            (&passed, overrides(true, false), false),
            (&passed, overrides(false, true), false),
            (&passed, overrides(true, true), true),
            (&first, overrides(false, true), true),
            (&first, overrides(true, false), false),
        ] {
            let found = allowed(path, manifest, overrides);
            assert_eq!(found.is_ok(), is_allowed, "{overrides:?}: {found:?}");
        }
        let text = allowed(path, &passed, overrides(false, false)).unwrap_err().to_string();
        assert!(text.contains(DOUBT_PASSED), "{text}");
        let text = allowed(path, &passed, overrides(false, true)).unwrap_err().to_string();
        assert!(text.contains("--resend sends it once more"), "{text}");
    }
}
