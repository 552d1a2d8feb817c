//! The source's link to a file: several threads write pages to their offsets, and the stream is written around them.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded, unbounded};

use super::SnapshotFile;
use super::file::{MappedFile, not_opened};
use super::sink::MappedSink;
use super::writer::{Done, PageWriter, Written};
use crate::guest::GuestMemory;
use crate::observe::PageCounts;
use crate::ram::{MoverAbilities, PageBatch, RoundKind};
use crate::stream::snapshot_note::SnapshotNote;
use crate::sys::{CancelToken, SpawnFn, Stop};
use crate::transport::{ByteSink, ChannelError, MoveError, Offer, OpenError, Returned, SourceLink, Ticket};

/// Pages of one batch: 2 MiB of 4 KiB pages.
const BATCH_PAGES: u32 = 512;
/// Batches that wait for each thread, besides the one that it writes.
const QUEUED: usize = 2;
/// Longest time between two checks of the caller's [`Stop`].
const POLL_INTERVAL: Duration = Duration::from_millis(50);

const WRITING: &str = "writing pages";

/// Pages at their offsets in a file, everything else around them.
pub struct MappedLink {
    file: Arc<MappedFile>,
    sink: MappedSink,
    written: Arc<Written>,
    /// `None` once the threads have been ended.
    queue: Option<Sender<(Ticket, PageBatch)>>,
    /// The receiving end: batches left in the queue are returned to the guest.
    left: Receiver<(Ticket, PageBatch)>,
    done: Receiver<Done>,
    threads: Vec<JoinHandle<()>>,
    cancel: CancelToken,
    finished: Vec<Returned>,
    unsent: Vec<PageBatch>,
    /// Batches that were not answered.
    out: usize,
    tickets: u64,
}

/// Creates or empties the file, and starts the threads.
pub(in crate::transport) fn create(
    path: &Path,
    starts_at: u64,
    guest: Arc<dyn GuestMemory>,
    asked: u8,
    spawn: &Arc<SpawnFn>,
) -> Result<MappedLink, OpenError> {
    let file = Arc::new(MappedFile::to_write(path, starts_at).map_err(not_opened(path))?);
    let threads = super::threads(asked);
    let written = Arc::<Written>::default();
    let (queue, work) = bounded(QUEUED * threads);
    let (tell, done) = unbounded();
    let mut link = MappedLink {
        sink: MappedSink::new(Arc::clone(&file), Arc::clone(&written), guest.table().page()),
        file: Arc::clone(&file),
        written: Arc::clone(&written),
        queue: Some(queue),
        left: work.clone(),
        done,
        threads: Vec::new(),
        cancel: CancelToken::default(),
        finished: Vec::new(),
        unsent: Vec::new(),
        out: 0,
        tickets: 0,
    };
    for _ in 0..threads {
        let writer = PageWriter {
            file: Arc::clone(&file),
            guest: Arc::clone(&guest),
            written: Arc::clone(&written),
            work: work.clone(),
            done: tell.clone(),
            stop: Stop::on(&link.cancel),
        };
        let started = spawn("ramwire-file-tx", Box::new(move || writer.run()));
        let failed = |source| file.failed("starting a thread that writes pages", source);
        link.threads.push(started.map_err(failed)?);
    }
    Ok(link)
}

impl MappedLink {
    fn take(&mut self, done: Done) -> Result<(), MoveError> {
        self.out -= 1;
        match done {
            Done::Written(returned) => {
                self.finished.push(returned);
                Ok(())
            }
            Done::Failed(batch, error) => {
                self.unsent.push(batch);
                Err(error)
            }
        }
    }

    /// Waits for the next result, but not beyond `stop`.
    fn wait(&mut self, stop: &Stop) -> Result<(), MoveError> {
        loop {
            match self.done.recv_timeout(POLL_INTERVAL) {
                Ok(done) => return self.take(done),
                // A thread that ended by a panic sends no more results.
                Err(RecvTimeoutError::Timeout) if self.threads.iter().any(JoinHandle::is_finished) => {
                    return Err(self.gone());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.gone()),
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: WRITING }.into());
            }
        }
    }

    /// Makes the file's operations fail from this step on, counted from now.
    #[cfg(test)]
    pub(crate) fn break_at(&self, step: i64) {
        self.file.breaks_at.store(step, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn journal(&self) -> Vec<super::journal::Op> {
        self.file.journal.ops()
    }

    #[cfg(test)]
    pub(super) fn is_direct(&self) -> Option<bool> {
        self.file.is_direct()
    }

    /// For tests of other layers.
    #[cfg(test)]
    pub(crate) fn create(path: &Path, guest: Arc<dyn GuestMemory>) -> Self {
        let spawn: Arc<SpawnFn> = Arc::new(crate::sys::spawn_thread);
        create(path, 0, guest, 2, &spawn).unwrap_or_else(|error| panic!("{error}"))
    }

    fn gone(&self) -> MoveError {
        let source = std::io::Error::other("a thread that writes pages has ended");
        self.file.failed(WRITING, source).into()
    }

    fn wait_all(&mut self, stop: &Stop) -> Result<(), MoveError> {
        while self.out > 0 {
            self.wait(stop)?;
        }
        Ok(())
    }

    fn stop_threads(&mut self) {
        self.cancel.cancel();
        self.queue = None;
        // Taken before the threads see these batches: they would write them.
        let left: Vec<_> = self.left.try_iter().collect();
        self.unsent.extend(left.into_iter().map(|(_, batch)| batch));
        for thread in self.threads.drain(..) {
            // A panic of the thread left its batch unwritten; after a failure nothing counts as sent.
            let _ = thread.join();
        }
        while let Ok(done) = self.done.try_recv() {
            // A failure has already been reported, or no longer matters.
            let _ = self.take(done);
        }
    }
}

/// The name of a base: without a folder if both files are in the same one, so that both can be moved.
fn seen_from(own: &Path, base: &Path) -> String {
    let name = base.file_name().filter(|_| base.parent() == own.parent());
    name.map_or_else(|| base.display().to_string(), |name| name.to_string_lossy().into_owned())
}

impl crate::transport::Sealed for MappedLink {}

impl SourceLink for MappedLink {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            classifies: true,
            takes_deltas: false,
            exclusive_round: false,
            confirms_placement: false,
            ordered: false,
            registers_memory: false,
            serves_reads: false,
            batches_in_flight: (self.threads.len() * (QUEUED + 1)) as u32,
            batch_pages: BATCH_PAGES,
        }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        &mut self.sink
    }

    fn keep_note(&mut self, note: &SnapshotNote) -> Result<Option<SnapshotFile>, MoveError> {
        let own = std::path::absolute(self.file.path());
        let own = own.map_err(|source| self.file.failed("looking for its folder", source))?;
        let mut note = note.clone();
        if let Some(base) = &mut note.base {
            base.path = seen_from(&own, Path::new(&base.path));
            self.written.zeros_stay.store(true, Ordering::Relaxed);
        }
        self.sink.keep_note(note);
        Ok(Some(SnapshotFile { path: own, starts_at: self.file.starts_at }))
    }

    fn channel_bytes(&self) -> u64 {
        self.written.bytes.load(Ordering::Relaxed)
    }

    fn sent_pages(&self) -> Vec<PageCounts> {
        vec![self.written.counts()]
    }

    fn open_round(&mut self, _kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    fn offer(&mut self, batch: PageBatch, stop: &Stop) -> Result<Offer, MoveError> {
        let ticket = Ticket(self.tickets);
        self.tickets += 1;
        let mut work = (ticket, batch);
        loop {
            let Some(queue) = &self.queue else {
                self.unsent.push(work.1);
                return Err(self.gone());
            };
            match queue.try_send(work) {
                Ok(()) => {
                    self.out += 1;
                    return Ok(Offer::Taken(ticket));
                }
                Err(TrySendError::Full(back) | TrySendError::Disconnected(back)) => work = back,
            }
            if let Err(error) = self.wait(stop) {
                self.unsent.push(work.1);
                return Err(error);
            }
        }
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        while let Ok(done) = self.done.try_recv() {
            self.take(done)?;
        }
        out.append(&mut self.finished);
        Ok(())
    }

    /// A page is sent once in a round, so between two rounds it is enough that the first has ended. Its pages are then
    /// synced to the disk: otherwise they would have to be synced while the guest is stopped.
    fn close_round(&mut self, kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        self.wait_all(stop)?;
        match kind {
            RoundKind::Setup => {}
            RoundKind::Live => {
                let synced = self.file.sync();
                synced.map_err(|source| self.file.failed("syncing pages", source))?;
            }
            RoundKind::Final => self.sink.pages_end(),
        }
        Ok(())
    }

    fn drain(&mut self, stop: &Stop) -> Result<(), MoveError> {
        self.wait_all(stop)?;
        Ok(self.sink.flush(stop)?)
    }

    fn close(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        self.stop_threads();
        Ok(())
    }

    fn reclaim(&mut self) -> Vec<PageBatch> {
        self.stop_threads();
        std::mem::take(&mut self.unsent)
    }
}

impl Drop for MappedLink {
    fn drop(&mut self) {
        self.stop_threads();
    }
}
