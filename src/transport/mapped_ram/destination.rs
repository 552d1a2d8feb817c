//! The destination's link to a file: its stream, with the page offsets as page channels.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, unbounded};

use super::file::{MappedFile, not_opened};
use super::layers::{Layers, Opened};
use super::pages::MappedPages;
use super::reader::{Common, Reader, SLICE};
use crate::guest::{GuestError, Placer};
use crate::observe::PageCounts;
use crate::ram::PageBitmap;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::mapped_stream::{Places, PlainStream};
use crate::stream::snapshot_note::SnapshotNote;
use crate::sys::{CancelToken, Mapping, MappingError, RecvPart, SpawnFn, Stop, is_zero, spawn_thread};
use crate::transport::{
    Address, ByteSource, ChannelError, DestinationAbilities, DestinationLink, LiveBytes, MoveError,
    OpenError, Target,
};
use crate::units::PageIndex;

/// Longest time between two checks of the caller's [`Stop`].
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Bytes that are checked and cleared at a time.
const CLEARED: usize = 1 << 20;

const WAITING: &str = "waiting for pages that are read";

/// A mapped-ram file, completely read except for its pages.
pub struct MappedDestination {
    file: Arc<MappedFile>,
    stream: PlainStream,
    note: Option<SnapshotNote>,
    /// Where its pages are: in it, and in the files that it was taken against.
    layers: Arc<Layers>,
    /// Bytes of the stream that were given out.
    at: usize,
    threads: usize,
    spawn: Arc<SpawnFn>,
    running: Option<Running>,
    barriers: u64,
    bytes: Arc<AtomicU64>,
}

struct Running {
    told: Receiver<Result<(), MoveError>>,
    placer: Arc<Placer>,
    threads: Vec<JoinHandle<()>>,
    left: usize,
    cancel: CancelToken,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.cancel.cancel();
        for thread in self.threads.drain(..) {
            // A panic of the thread left pages unread; they are no longer needed.
            let _ = thread.join();
        }
    }
}

/// Opens the file whose stream begins at `starts_at`, and reads all of it except its pages, which `asked` threads read
/// later; 0: a number that suits this host.
pub(in crate::transport) fn open(
    path: &Path,
    starts_at: u64,
    asked: u8,
    spawn: &Arc<SpawnFn>,
) -> Result<MappedDestination, OpenError> {
    let file = MappedFile::to_read(path, starts_at).map_err(not_opened(path))?;
    let address = file.name();
    let unreadable = |source| OpenError::Unreadable { address: address.clone(), source };
    let opened = Opened::read(file).map_err(unreadable)?;
    let Opened { file, stream, note, .. } = &opened;
    Ok(MappedDestination {
        layers: Arc::new(Layers::of(&opened).map_err(unreadable)?),
        file: Arc::clone(file),
        stream: stream.clone(),
        note: note.clone(),
        at: 0,
        threads: super::threads(asked),
        spawn: Arc::clone(spawn),
        running: None,
        barriers: 0,
        bytes: Arc::default(),
    })
}

impl MappedDestination {
    /// Sets the number of threads that read the pages, which `spawn` starts; 0: a number that suits this host.
    #[must_use]
    pub fn read_by(mut self, threads: u8, spawn: Arc<SpawnFn>) -> Self {
        (self.threads, self.spawn) = (super::threads(threads), spawn);
        self
    }

    #[cfg(test)]
    pub(super) fn is_direct(&self) -> Option<bool> {
        self.file.is_direct()
    }

    /// What errors call it.
    pub fn name(&self) -> String {
        self.file.name()
    }

    /// The stream of the file, as a plain one.
    pub fn stream(&self) -> &PlainStream {
        &self.stream
    }

    /// The file at `address`, whose memory is then mapped instead of being read.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::NotMapped`] for an address of another kind.
    pub fn open(address: &Address) -> Result<Self, OpenError> {
        let spawn: Arc<SpawnFn> = Arc::new(spawn_thread);
        match address.target() {
            Target::PathAt { path, offset } => open(path, *offset, 0, &spawn),
            _ => Err(OpenError::NotMapped { address: address.to_string() }),
        }
    }

    /// The memory of a block, by its place in the list, mapped from the file; pages that are not in the file are zero.
    /// Writes to the mapping do not change the file. `None` for a block that was left out.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn map(&self, block: usize) -> Result<Option<Mapping>, MappingError> {
        let Some((file, present, places)) = self.layers.lowest(block) else { return Ok(None) };
        if places.header.is_absent() {
            return Ok(None);
        }
        let (start, page) = (places.header.pages_offset, places.header.page_size.bytes());
        let mapping = file.map(start, places.block.used_length)?;
        let mut at = 0;
        while at < places.pages() {
            let run = present.next_run(PageIndex(at), u64::MAX).unwrap_or(places.pages()..places.pages());
            clear_stale(file, &mapping, start, at * page..run.start * page);
            at = run.end;
        }
        self.read_above(block, file, &mapping, page)?;
        Ok(Some(mapping))
    }

    /// Pages that are in other files than the one that is mapped are read into the copy.
    fn read_above(
        &self,
        block: usize,
        below: &MappedFile,
        mapping: &Mapping,
        page: u64,
    ) -> Result<(), MappingError> {
        let mut next = 0;
        while let Some((file, run, at)) = self.layers.next_run(block, next, SLICE) {
            next = run.end;
            if std::ptr::eq(file, below) {
                continue;
            }
            let Ok(span) = mapping.region().span(run.start * page, (run.end - run.start) * page) else {
                continue;
            };
            file.fill(span, at).map_err(|source| MappingError::Kernel {
                what: "reading a snapshot into",
                len: span.len() as u64,
                remedy: "all files of the snapshot must stay as they are",
                source,
            })?;
        }
        Ok(())
    }

    /// A block that is not in the file must be one that this end has from another source.
    fn check_left_out(&self, placer: &Placer) -> Result<(), MoveError> {
        let table = placer.memory().table();
        for places in self.stream.places.iter().filter(|places| places.header.is_absent()) {
            let name = places.block.name.as_str();
            let index = table.find(name).map_err(GuestError::from)?;
            if !table.get(index).is_some_and(|block| block.flags.ignored) {
                let why =
                    format!("RAM block {name} is not in it (x-ignore-shared); map its memory here, too");
                return Err(self
                    .file
                    .failed("looking for the RAM blocks", std::io::Error::other(why))
                    .into());
            }
        }
        Ok(())
    }

    /// The pages in the file, to be read in any order for the guest whose memory `placer` fills.
    ///
    /// # Errors
    /// A block is missing in the file or here.
    pub fn pages(&self, placer: &Placer) -> Result<MappedPages, MoveError> {
        self.check_left_out(placer)?;
        let table = placer.memory().table();
        let mut blocks = vec![None; table.blocks().len()];
        for (own, places) in self.stream.places.iter().enumerate() {
            let index = table.find(places.block.name.as_str()).map_err(GuestError::from)?;
            if !places.header.is_absent() {
                blocks[index.as_usize()] = Some((own, places.clone()));
            }
        }
        Ok(MappedPages { layers: Arc::clone(&self.layers), name: self.name(), blocks })
    }

    /// All pages in the file, by the blocks of the file's own list.
    pub fn own_pages(&self) -> MappedPages {
        let of =
            |(own, places): (usize, &Places)| (!places.header.is_absent()).then(|| (own, places.clone()));
        let blocks = self.stream.places.iter().enumerate().map(of).collect();
        MappedPages { layers: Arc::clone(&self.layers), name: self.name(), blocks }
    }

    /// The pages that are in it or in its bases, block by block; of a block that was left out, none.
    pub fn present(&self) -> &[PageBitmap] {
        self.layers.present()
    }

    /// Which snapshot it is, and which one it was taken against, if [`SnapshotSession`](crate::session::SnapshotSession) has
    /// written it.
    pub fn note(&self) -> Option<&SnapshotNote> {
        self.note.as_ref()
    }

    /// Files that its pages are in: itself, its base, the base of that one.
    pub fn files(&self) -> Vec<PathBuf> {
        self.layers.files().map(|file| file.path().to_owned()).collect()
    }
}

/// Places of pages that are not in the file may hold old bytes.
fn clear_stale(file: &MappedFile, mapping: &Mapping, start: u64, bytes: Range<u64>) {
    for at in bytes.clone().step_by(CLEARED) {
        let len = (CLEARED as u64).min(bytes.end - at);
        let span = mapping.region().span(at, len).ok();
        if let Some(span) = span.filter(|span| file.may_hold(start + at, len) && !is_zero(*span)) {
            span.fill_zero();
        }
    }
}

impl crate::transport::Sealed for MappedDestination {}

impl ByteSource for MappedDestination {
    fn recv(&mut self, into: &mut [RecvPart<'_>], _stop: &Stop) -> Result<usize, ChannelError> {
        let mut given = 0;
        for part in into {
            let rest = &self.stream.bytes[self.at..];
            let len = rest.len().min(part.len());
            match part {
                RecvPart::Own(room) => room[..len].copy_from_slice(&rest[..len]),
                RecvPart::Guest(span) => _ = span.copy_from(&rest[..len]),
            }
            self.at += len;
            given += len;
        }
        Ok(given)
    }

    fn is_stored(&self) -> bool {
        true
    }
}

impl DestinationLink for MappedDestination {
    fn abilities(&self) -> DestinationAbilities {
        let page_channels = u8::try_from(self.threads).unwrap_or(u8::MAX);
        DestinationAbilities { page_channels, ..DestinationAbilities::default() }
    }

    fn stream(&mut self) -> &mut dyn ByteSource {
        self
    }

    /// Memory is available now: the threads begin to read.
    fn announce(&mut self, placer: &Arc<Placer>, _blocks: &AnnouncedBlocks) -> Result<(), MoveError> {
        self.check_left_out(placer)?;
        let (tell, told) = unbounded();
        let common = Arc::new(Common {
            layers: Arc::clone(&self.layers),
            placer: Arc::clone(placer),
            places: self.stream.places.clone(),
            next: AtomicUsize::new(0),
            bytes: Arc::clone(&self.bytes),
        });
        let cancel = CancelToken::default();
        let mut running = Running { told, placer: Arc::clone(placer), threads: Vec::new(), left: 0, cancel };
        for _ in 0..self.threads {
            let stop = Stop::on(&running.cancel);
            let reader = Reader { common: Arc::clone(&common), told: tell.clone(), stop };
            let started = (self.spawn)("ramwire-file-rx", Box::new(move || reader.run()));
            let failed = |source| self.file.failed("starting a thread that reads pages", source);
            running.threads.push(started.map_err(failed)?);
            running.left += 1;
        }
        self.running = Some(running);
        Ok(())
    }

    /// The first barrier comes after the list of blocks. If another comes before the end of RAM, that one waits.
    fn barrier(&mut self, stop: &Stop) -> Result<(), MoveError> {
        self.barriers += 1;
        if self.stream.has_end && self.barriers == 1 {
            return Ok(());
        }
        let Some(running) = &mut self.running else { return Ok(()) };
        while running.left > 0 {
            match running.told.recv_timeout(POLL_INTERVAL) {
                Ok(ended) => {
                    ended?;
                    running.left -= 1;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let source = std::io::Error::other("a thread that reads pages has ended");
                    return Err(self.file.failed("reading pages", source).into());
                }
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: WAITING }.into());
            }
        }
        Ok(())
    }

    fn channel_bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn live_bytes(&self) -> LiveBytes {
        LiveBytes { channels: Some(Arc::clone(&self.bytes)), ..LiveBytes::default() }
    }

    fn placed_pages(&self) -> Vec<PageCounts> {
        self.running.iter().map(|running| running.placer.counts()).collect()
    }

    fn revoke(&mut self) {
        self.running = None;
    }

    fn close(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }
}
