//! The destination's link to a file: its stream, with the page offsets as page channels.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, unbounded};

use super::file::{MappedFile, not_opened};
use super::pages::MappedPages;
use super::reader::{Common, Reader};
use crate::guest::{GuestError, Placer};
use crate::observe::PageCounts;
use crate::ram::PageBitmap;
use crate::stream::qemu::incoming::{AnnouncedBlocks, IncomingConfig};
use crate::stream::qemu::mapped::decode_bitmap;
use crate::stream::qemu::mapped_stream::{MappedReadError, Places, PlainStream};
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
    present: Vec<PageBitmap>,
    /// Bytes of the stream that were returned so far.
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
    let unreadable = |source| OpenError::Unreadable { address: file.name(), source };
    let file_len = Some(file.len().map_err(not_opened(path))?);
    let config = IncomingConfig { starts_at, file_len, adopt_page_size: true, ..IncomingConfig::default() };
    let stream = PlainStream::read(config, |at, into| file.read(into, at)).map_err(unreadable)?;
    let present = stream.places.iter().map(|places| read_bitmap(&file, places)).collect::<Result<_, _>>();
    Ok(MappedDestination {
        present: present.map_err(unreadable)?,
        file: Arc::new(file),
        stream,
        at: 0,
        threads: super::threads(asked),
        spawn: Arc::clone(spawn),
        running: None,
        barriers: 0,
        bytes: Arc::default(),
    })
}

fn read_bitmap(file: &MappedFile, places: &Places) -> Result<PageBitmap, MappedReadError> {
    if places.header.is_absent() {
        return Ok(PageBitmap::new(0));
    }
    // Not more than the file has: its offsets were compared with its length.
    let mut bytes = vec![0; usize::try_from(places.bitmap_len()).unwrap_or(usize::MAX)];
    let at = places.header.bitmap_offset;
    file.read_all(&mut bytes, at).map_err(|source| MappedReadError::Io { at, source })?;
    let present = decode_bitmap(&bytes, places.block.name.as_str(), places.pages());
    Ok(present.map_err(|error| error.based(at.saturating_sub(file.starts_at)))?)
}

impl MappedDestination {
    /// Sets the number of threads that read the pages, which `spawn` starts; 0: a number that suits this host.
    #[must_use]
    pub fn read_by(mut self, threads: u8, spawn: Arc<SpawnFn>) -> Self {
        (self.threads, self.spawn) = (super::threads(threads), spawn);
        self
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
        let (Some(places), Some(present)) = (self.stream.places.get(block), self.present.get(block)) else {
            return Ok(None);
        };
        if places.header.is_absent() {
            return Ok(None);
        }
        let (start, page) = (places.header.pages_offset, places.header.page_size.bytes());
        let mapping = self.file.map(start, places.block.used_length)?;
        let mut at = 0;
        while at < places.pages() {
            let run = present.next_run(PageIndex(at), u64::MAX).unwrap_or(places.pages()..places.pages());
            self.clear_stale(&mapping, start, at * page..run.start * page);
            at = run.end;
        }
        Ok(Some(mapping))
    }

    /// Offsets of pages that are not in the file may hold old bytes.
    fn clear_stale(&self, mapping: &Mapping, start: u64, bytes: Range<u64>) {
        for at in bytes.clone().step_by(CLEARED) {
            let len = (CLEARED as u64).min(bytes.end - at);
            let span = mapping.region().span(at, len).ok();
            if let Some(span) = span.filter(|span| self.file.may_hold(start + at, len) && !is_zero(*span)) {
                span.fill_zero();
            }
        }
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
        for (places, present) in self.stream.places.iter().zip(&self.present) {
            let index = table.find(places.block.name.as_str()).map_err(GuestError::from)?;
            if !places.header.is_absent() {
                blocks[index.as_usize()] = Some((places.clone(), present.clone()));
            }
        }
        Ok(MappedPages { file: Arc::clone(&self.file), blocks })
    }

    /// All pages in the file, by the blocks of the file's own list.
    pub fn own_pages(&self) -> MappedPages {
        let of = |(places, present): (&Places, &PageBitmap)| {
            (!places.header.is_absent()).then(|| (places.clone(), present.clone()))
        };
        let blocks = self.stream.places.iter().zip(&self.present).map(of).collect();
        MappedPages { file: Arc::clone(&self.file), blocks }
    }

    /// The pages in the file, block by block; none of a block that was left out.
    pub fn present(&self) -> &[PageBitmap] {
        &self.present
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
            file: Arc::clone(&self.file),
            placer: Arc::clone(placer),
            places: self.stream.places.clone(),
            present: std::mem::take(&mut self.present),
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
