//! A guest on its way into a folder.

use std::io::{self, Read};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ramwire::error::Remedy;
use ramwire::guest::{DeviceState, GuestControl, GuestMemory, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{Error, Incoming, MemoryProvider};
use ramwire::stream::qemu::file::IGNORE_SHARED;
use ramwire::stream::qemu::incoming::Seen;
use ramwire::stream::qemu::state::sections_end;
use ramwire::stream::qemu::style::PeerStyle;
use ramwire::sys::Mapping;
use ramwire::units::PageSize;

use super::ram_file::{MAX_KEPT_OPEN, RamFile, check_room, is_tmpfs};
use super::{BlockEntry, EARLY, FORMAT, Manifest, State, Store, StoreError, TAIL, failed, private};
use crate::cli::remedies::in_words;

/// The folder seen by the destination's session: the memory it arrives in, and the machine that "runs" once
/// everything is on the disk. Clones are the same guest.
#[derive(Clone)]
pub struct IncomingGuest(Arc<Mutex<Inner>>);

struct Inner {
    store: Store,
    manifest: Option<Manifest>,
    files: Vec<RamFile>,
    /// Memory that no file holds yet.
    held: bool,
    early: Vec<u8>,
    native: bool,
    /// The source may resume the guest until it receives the report that the guest is here.
    source_waits: bool,
    /// The source gives the guest away with its last byte, and waits for no answer.
    unasked: bool,
    /// Its device state has a length, which proves it complete: that of a checkpoint.
    sized: bool,
    /// Blocks that the guest's next place maps as its last one does.
    shared: Vec<BlockName>,
}

impl IncomingGuest {
    /// Takes a folder that holds no guest, or one that never arrived.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn new(store: Store) -> Result<Self, StoreError> {
        if let Some(manifest) = store.manifest()?
            && manifest.state != State::Arriving
        {
            return Err(StoreError::Occupied { path: store.path.clone(), state: manifest.state });
        }
        let inner = Inner {
            store,
            manifest: None,
            files: Vec::new(),
            held: false,
            early: Vec::new(),
            native: false,
            source_waits: false,
            unasked: false,
            sized: false,
            shared: Vec::new(),
        };
        Ok(Self(Arc::new(Mutex::new(inner))))
    }

    /// The memory of these blocks is also present where the guest continues: none of their pages arrives.
    pub fn sharing(self, blocks: &[BlockName]) -> Self {
        self.lock().shared = blocks.to_vec();
        self
    }

    /// It comes in checkpoints, whose device state has a length.
    pub fn in_checkpoints(self) -> Self {
        self.lock().sized = true;
        self
    }

    /// Its source may run it: from [`resume`](GuestControl::resume) on the manifest states a doubt.
    pub fn source_may_run(&self) {
        self.lock().source_waits = true;
    }

    /// The state that the manifest has once the guest is here.
    pub fn state(&self) -> State {
        let inner = self.lock();
        let state = inner.manifest.as_ref().map_or(State::Arriving, |manifest| manifest.state);
        if inner.source_waits && state != State::Arriving { State::InDoubt } else { state }
    }

    /// A NIC will write the pages. Kernels refuse that in a disk's page cache, so RAM arrives in memory and is written to
    /// the files at the end, unless the folder itself lies in memory.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn written_by_nic(self) -> Result<Self, StoreError> {
        {
            let mut inner = self.lock();
            inner.held = !is_tmpfs(&inner.store.path)?;
        }
        Ok(self)
    }

    /// The source waits for no answer: it may have given the guest away, whatever has come of it.
    pub fn comes_unasked(&self) -> bool {
        self.lock().unasked
    }

    /// It may run at another place, to the end: from [`resume`](GuestControl::resume) on the manifest states that.
    pub fn doubt(&self) {
        if let Some(manifest) = &mut self.lock().manifest {
            *manifest = manifest.in_state(State::InDoubt);
        }
    }

    /// The source has received the report that the guest is here, and gives it up: the manifest states how much of it
    /// is here.
    ///
    /// # Errors
    /// [`StoreError`]; the manifest then has the state `in-doubt`.
    pub fn settle(&self) -> Result<(), StoreError> {
        let inner = self.lock();
        inner.manifest.as_ref().map_or(Ok(()), |manifest| inner.store.put_manifest(manifest))
    }

    /// The manifest in its current state.
    pub fn manifest(&self) -> Option<Manifest> {
        self.lock().manifest.clone()
    }

    /// It did not arrive: removes its files.
    pub fn discard(&self) {
        let mut inner = self.lock();
        inner.files.clear();
        inner.manifest = None;
        if let Err(error) =
            private::remove_ram(&inner.store.path).and_then(|()| inner.store.remove_manifest())
        {
            tracing::warn!(%error, "what came of the guest is left in the folder");
        }
    }

    /// It has arrived: releases the space reserved for pages that stayed zero; returns its bytes.
    pub fn release(&self) -> u64 {
        let inner = self.lock();
        let released = inner.files.iter().map(|file| file.release(&inner.store));
        released
            .map(|each| {
                each.unwrap_or_else(|error| {
                    tracing::warn!(%error, "room that was reserved stays taken");
                    0
                })
            })
            .sum()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryProvider for IncomingGuest {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        self.lock().unasked = incoming.gives_unasked;
        let made = self.lock().make(incoming);
        let memory = made.map_err(|error| Error::Config {
            remedy: Remedy::Advice(match &error {
                StoreError::NoRoom { .. } => "free some, or give a folder with more room",
                StoreError::Io { .. } => "or give another folder",
                StoreError::NotPlain { .. } => "or give a folder of its own",
                StoreError::LeftOut { .. } => "or turn the capability off at the source",
                StoreError::NoSuchBlock { .. } => "name a block of the source",
                _ => "give a folder of its own on a file system with room",
            }),
            what: in_words(&error),
        })?;
        Ok(Arc::new(memory))
    }

    /// Its file is new, whatever the folder contained.
    fn is_zeroed(&self, _block: &RamBlock) -> bool {
        true
    }

    fn arrived(&mut self, incoming: &Incoming, native: bool) {
        let mut inner = self.lock();
        inner.early = incoming.early_sections.clone();
        inner.native = native;
        // A ramwire has handed the guest over by COMMIT, and never resumes it by itself.
        inner.source_waits = incoming.has_return_path && !native;
        if let Some(manifest) = &mut inner.manifest {
            let framing = incoming.seen.framing;
            (manifest.configuration, manifest.footers) = (framing.configuration, framing.footers);
            manifest.peer_style = style_seen(&incoming.configuration.machine, &incoming.seen);
        }
    }
}

impl Inner {
    fn make(&mut self, incoming: &Incoming) -> Result<MappedGuest, StoreError> {
        let configuration = &incoming.configuration;
        self.check_shared(incoming)?;
        private::remove_ram(&self.store.path)?;
        let stored = incoming.blocks.iter().filter(|block| !self.shared.contains(&block.name));
        check_room(&self.store.path, stored.map(|block| block.used_length).sum(), self.held)?;
        let page = configuration.page_size.unwrap_or(PageSize::SIZE_4K);
        let mut builder = MappedGuest::builder(page);
        let mut blocks = Vec::new();
        for (index, block) in incoming.blocks.iter().enumerate() {
            let mut block = block.clone();
            if self.shared.contains(&block.name) {
                block.flags.ignored = true;
                builder = builder.mapping(block.clone(), &nothing(&block, &self.store.path)?);
                blocks.push(entry(index, &block, String::new()));
                continue;
            }
            let file = format!("ram-{index:03}.bin");
            let passed = incoming.passed.iter().find(|passed| *passed.name() == block.name);
            let made = match passed {
                Some(passed) => RamFile::passed(&self.store, file.clone(), block.used_length, passed)?,
                None => RamFile::make(&self.store, file.clone(), block.used_length, self.held)?,
            };
            let detaches = passed.is_none() && incoming.blocks.len() > MAX_KEPT_OPEN;
            let made = if detaches { made.detached() } else { made };
            block.flags.shared = true;
            builder = builder.mapping(block.clone(), &made.mapping);
            self.files.push(made);
            blocks.push(entry(index, &block, file));
        }
        let manifest = Manifest {
            format: FORMAT,
            state: State::Arriving,
            otherwise: None,
            passed: false,
            machine: configuration.machine.clone(),
            capabilities: configuration.capabilities.clone(),
            uuid: configuration.uuid.map(|uuid| uuid.iter().map(|byte| format!("{byte:02x}")).collect()),
            page_size: configuration.page_size.map(PageSize::bytes),
            // Known once everything has arrived.
            configuration: true,
            footers: true,
            source: "qemu".into(),
            peer_style: None,
            blocks,
        };
        self.store.put_manifest(&manifest)?;
        self.manifest = Some(manifest);
        builder.build().map_err(|error| failed(&self.store.path, "mapping")(io::Error::other(error)))
    }

    /// The source leaves out shared blocks, but does not report which they are.
    fn check_shared(&self, incoming: &Incoming) -> Result<(), StoreError> {
        let names =
            || incoming.blocks.iter().map(|block| block.name.to_string()).collect::<Vec<_>>().join(", ");
        if let Some(unknown) =
            self.shared.iter().find(|name| incoming.blocks.iter().all(|b| b.name != **name))
        {
            return Err(StoreError::NoSuchBlock { name: unknown.to_string(), blocks: names() });
        }
        if self.shared.is_empty() && incoming.configuration.has(IGNORE_SHARED) {
            return Err(StoreError::LeftOut { blocks: names() });
        }
        Ok(())
    }

    /// RAM, early sections and device state onto the disk; the manifest still has the state `arriving`.
    fn put_state(&mut self, tail: &[u8]) -> Result<(), StoreError> {
        self.files.iter().try_for_each(|file| file.put(&self.store))?;
        self.store.put(EARLY, &self.early)?;
        self.store.put(TAIL, tail)?;
        if let Some(manifest) = &mut self.manifest {
            // Between ramwire ends, and in checkpoints, the state arrived with its length: no proof is needed that it is
            // complete.
            let complete = self.native || self.sized || sections_end(tail, manifest.framing()).is_some();
            manifest.state = if complete { State::Whole } else { State::Incomplete };
            manifest.source = if self.native { "ramwire" } else { "qemu" }.into();
        }
        Ok(())
    }
}

fn entry(index: usize, block: &RamBlock, file: String) -> BlockEntry {
    BlockEntry {
        index: index as u32,
        name: block.name.as_str().to_owned(),
        file,
        used_length: block.used_length,
        guest_addr: block.guest_addr.map(|addr| addr.0),
        ignored: block.flags.ignored,
    }
}

/// Addresses for a block whose memory is elsewhere; they are never read or written.
pub(super) fn nothing(block: &RamBlock, path: &Path) -> Result<Mapping, StoreError> {
    let mapping = Mapping::memfd(block.name.as_str(), block.used_length);
    mapping.map_err(|error| failed(path, "mapping")(io::Error::other(error)))
}

/// The style of a source whose machine name shows none, from the contents of its stream.
pub(super) fn style_seen(machine: &str, seen: &Seen) -> Option<String> {
    let told = PeerStyle::of_machine(machine).is_some();
    let name = if seen.switchover_start { "qemu-10.0" } else { "qemu-8.1" };
    let shown = PeerStyle::of_source(machine, seen).filter(|_| !told);
    shown.map(|_| name.to_owned())
}

impl GuestControl for IncomingGuest {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// "Runs" from here on, according to the manifest. A QEMU that waits for an answer resumes its guest if it gets
    /// none: until it has received the answer the guest is in doubt.
    fn resume(&mut self) -> io::Result<()> {
        let inner = self.lock();
        let Some(manifest) = &inner.manifest else { return Err(io::Error::other("nothing has arrived")) };
        let state = if inner.source_waits { State::InDoubt } else { manifest.state };
        inner.store.put_manifest(&manifest.in_state(state)).map_err(io::Error::other)
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    /// Files are mapped here, and their pages are never given back.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }
}

impl DeviceState for IncomingGuest {
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut tail = Vec::new();
        from.read_to_end(&mut tail)?;
        self.lock().put_state(&tail).map_err(io::Error::other)
    }

    /// A later state takes the place of this one.
    fn loads_again(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// As a receiver that is killed leaves it: between loading the guest and telling its source, and afterwards.
    #[test]
    fn a_guest_whose_source_waits_for_an_answer_is_in_doubt_until_it_has_been_told() {
        for (has_return_path, native, loaded) in
            [(true, false, State::InDoubt), (true, true, State::Whole), (false, false, State::Incomplete)]
        {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("guest");
            let mut guest = IncomingGuest::new(Store::open(&path).unwrap()).unwrap();
            let on_disk = || {
                let text = std::fs::read_to_string(path.join("manifest.json")).unwrap();
                serde_json::from_str::<Manifest>(&text).unwrap().state
            };
            let incoming = Incoming {
                passed: Vec::new(),
                configuration: Default::default(),
                blocks: vec![RamBlock::new(BlockName::new("m0").unwrap(), 4096)],
                vmm_configuration: Vec::new(),
                early_sections: Vec::new(),
                has_return_path,
                gives_unasked: !has_return_path,
                seen: Seen::default(),
            };
            guest.provide(&incoming).unwrap();
            guest.arrived(&incoming, native);
            guest.load(&mut &b"state"[..]).unwrap();
            assert_eq!(on_disk(), State::Arriving);
            guest.resume().unwrap();
            assert_eq!(on_disk(), loaded, "{has_return_path} {native}");
            guest.settle().unwrap();
            assert_eq!(on_disk(), if native { State::Whole } else { State::Incomplete });
        }
    }
}
