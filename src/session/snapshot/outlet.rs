//! The output of a snapshot: a thread that writes the stream, and pages as they arrive.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::error::Remedy;
use crate::guest::GuestMemory;
use crate::observe::PageCounts;
use crate::ram::{PageBatch, PageRun, PageSet, RoundKind, Verdict};
use crate::session::callback::guarded;
use crate::session::source::{RAM_SECTION_ID, announcements};
use crate::session::workers::Spawner;
use crate::session::{Error, SnapshotSettings};
use crate::stream::qemu::blocks::encode_block_list;
use crate::stream::qemu::section::{SectionName, encode_end, encode_part, encode_start};
use crate::stream::qemu::{file, ram};
use crate::stream::snapshot_note::SnapshotNote;
use crate::sys::{CancelToken, SendPart, Stop, WakeEvent};
use crate::transport::{Offer, SnapshotFile, SourceConnection, SourceLink};
use crate::units::PageIndex;

/// Interval at which a link that still has pages is asked for finished ones.
const COLLECT_INTERVAL: Duration = Duration::from_millis(1);
/// Maximum number of zero pages in a batch.
const MAX_ZERO_PAGES: u64 = 16 * 1024;

/// Commands for the thread, in order.
enum Order {
    Open,
    Pages(PageBatch),
    /// All pages except these were passed; these are zero. Then the device state, and the end.
    Close {
        unused: PageSet,
        state: Vec<u8>,
    },
}

/// Results of the thread.
pub(super) enum News {
    Opened,
    /// The link no longer reads these pages.
    Left(PageBatch),
    Closed(Sent),
    Failed(Error),
}

/// The written pages.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sent {
    pub(super) pages: PageCounts,
    pub(super) bytes: u64,
}

/// The session's handle for the thread. Dropping it stops the thread.
pub(super) struct Outlet {
    orders: Option<Sender<Order>>,
    news: Receiver<News>,
    halt: CancelToken,
    thread: Option<JoinHandle<()>>,
}

impl Outlet {
    /// Starts the thread `ramwire-snap-tx`; `wake` is raised with each result.
    pub(super) fn start(
        connection: SourceConnection,
        guest: Arc<dyn GuestMemory>,
        settings: &SnapshotSettings,
        wake: Arc<WakeEvent>,
        note: &SnapshotNote,
    ) -> Result<(Self, Option<SnapshotFile>), Error> {
        let mut connection = connection;
        refuse(&*connection.link)?;
        let file = connection.link.keep_note(note)?;
        if file.is_none() && note.base.is_some() {
            return Err(Error::Config {
                what: "changes since an earlier snapshot go into a file only, which names that one".into(),
                remedy: Remedy::Advice("write it to a mapped: file, or take it without a base"),
            });
        }
        let (orders, work) = unbounded();
        let (tell, news) = unbounded();
        let halt = CancelToken::default();
        let writer = Writer {
            link: connection.link,
            guest,
            settings: settings.clone(),
            stop: Stop::on(&halt),
            out: 0,
            tell: Tell { news: tell, wake },
        };
        let spawner: &Spawner = &settings.spawner;
        let thread = Some(spawner.spawn("ramwire-snap-tx", Box::new(move || writer.run(&work)))?);
        Ok((Self { orders: Some(orders), news, halt, thread }, file))
    }

    /// Writes everything that comes before the pages, and waits for it.
    pub(super) fn open(&self, stop: &Stop) -> Result<(), Error> {
        self.order(Order::Open)?;
        match self.wait(stop)? {
            News::Failed(error) => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) fn pages(&self, batch: PageBatch) -> Result<(), Error> {
        self.order(Order::Pages(batch))
    }

    pub(super) fn close(&self, unused: PageSet, state: Vec<u8>) -> Result<(), Error> {
        self.order(Order::Close { unused, state })
    }

    fn order(&self, order: Order) -> Result<(), Error> {
        let sent = self.orders.as_ref().is_some_and(|orders| orders.send(order).is_ok());
        if sent { Ok(()) } else { Err(self.why_ended()) }
    }

    /// The thread has ended: its last result is the reason.
    fn why_ended(&self) -> Error {
        let failed = |news| if let News::Failed(error) = news { Some(error) } else { None };
        self.news.try_iter().find_map(failed).unwrap_or_else(gone)
    }

    /// The next news, without waiting.
    pub(super) fn next(&self) -> Option<News> {
        self.news.try_recv().ok()
    }

    /// The next result; the end of `stop` ends the thread's work.
    pub(super) fn wait(&self, stop: &Stop) -> Result<News, Error> {
        use crate::transport::ChannelError;
        const INTERVAL: Duration = Duration::from_millis(50);
        loop {
            match self.news.recv_timeout(INTERVAL) {
                Ok(news) => return Ok(news),
                Err(RecvTimeoutError::Disconnected) => return Err(gone()),
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(reason) = stop.reason() {
                self.halt.cancel();
                return Err(ChannelError::Stopped { reason, doing: "writing the snapshot" }.into());
            }
        }
    }

    /// No more is written, and the output is incomplete.
    pub(super) fn abandon(&mut self) {
        self.halt.cancel();
        self.orders = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported as a result.
            let _ = thread.join();
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.abandon();
    }
}

fn gone() -> Error {
    let source = std::io::Error::other("it has ended");
    Error::Thread { name: "ramwire-snap-tx", source }
}

/// Refuses a link that a snapshot can't use.
fn refuse(link: &dyn SourceLink) -> Result<(), Error> {
    let why = match () {
        () if link.abilities().registers_memory => "RDMA reads the guest's memory itself",
        () if link.page_channels() > 0 => "page channels need a peer that answers",
        () if link.spliced().is_some() => "pages sent by reference are read after they have left",
        () => return Ok(()),
    };
    Err(Error::Config {
        what: format!("a snapshot can't go by this connection: {why}"),
        remedy: Remedy::Advice("write it to a file, or send it over one TCP or UNIX connection, by copy"),
    })
}

struct Tell {
    news: Sender<News>,
    wake: Arc<WakeEvent>,
}

impl Tell {
    /// The receiver is gone only after the session has ended.
    fn tell(&self, news: News) {
        let _ = self.news.send(news);
        self.wake.raise();
    }
}

/// The thread's side.
struct Writer {
    link: Box<dyn SourceLink>,
    guest: Arc<dyn GuestMemory>,
    settings: SnapshotSettings,
    stop: Stop,
    /// Number of batches that were not returned.
    out: usize,
    tell: Tell,
}

impl Writer {
    fn run(mut self, orders: &Receiver<Order>) {
        let done = guarded("writing the snapshot", || self.serve(orders)).and_then(|done| done);
        if let Err(error) = done {
            self.tell.tell(News::Failed(error));
        }
    }

    fn serve(&mut self, orders: &Receiver<Order>) -> Result<(), Error> {
        loop {
            let order = match self.out {
                0 => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
                _ => orders.recv_timeout(COLLECT_INTERVAL),
            };
            match order {
                Ok(Order::Open) => {
                    self.open()?;
                    self.tell.tell(News::Opened);
                }
                Ok(Order::Pages(batch)) => self.offer(batch)?,
                Ok(Order::Close { unused, state }) => {
                    let sent = self.close(&unused, &state)?;
                    self.tell.tell(News::Closed(sent));
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) => self.collect()?,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.link.sink().send(&[SendPart::Own(bytes)], &self.stop)?)
    }

    fn open(&mut self) -> Result<(), Error> {
        let mut head = Vec::new();
        file::encode_header(&mut head);
        if self.settings.framing.configuration {
            file::encode_configuration(&self.settings.configuration, &mut head);
        }
        let name = SectionName { id: RAM_SECTION_ID, idstr: ram::IDSTR, instance: 0, version: ram::VERSION };
        encode_start(&name, &mut head);
        encode_block_list(&announcements(self.guest.table(), false, false), &mut head);
        self.send(&head)?;
        self.link.open_round(RoundKind::Setup, &self.stop)?;
        self.link.close_round(RoundKind::Setup, &self.stop)?;
        let mut end = self.end_of_section();
        encode_part(RAM_SECTION_ID, &mut end);
        self.send(&end)?;
        self.link.sink().flush(&self.stop)?;
        Ok(self.link.open_round(RoundKind::Final, &self.stop)?)
    }

    fn end_of_section(&self) -> Vec<u8> {
        let mut end = ram::EOS_RECORD.to_vec();
        self.settings.framing.encode_footer(RAM_SECTION_ID, &mut end);
        end
    }

    fn offer(&mut self, batch: PageBatch) -> Result<(), Error> {
        let mut batch = batch;
        loop {
            match self.link.offer(batch, &self.stop)? {
                Offer::Taken(_) => break,
                Offer::Full(back) => {
                    batch = back;
                    self.link.drain(&self.stop)?;
                    self.collect()?;
                }
                Offer::Declined(_) => {
                    return Err(Error::Config {
                        what: "a snapshot's pages were declined by its connection".into(),
                        remedy: Remedy::Advice("write it to a file"),
                    });
                }
            }
        }
        self.out += 1;
        self.collect()
    }

    fn collect(&mut self) -> Result<(), Error> {
        let mut returned = Vec::new();
        self.link.collect(&mut returned)?;
        for returned in returned {
            self.out -= 1;
            self.tell.tell(News::Left(returned.batch));
        }
        Ok(())
    }

    fn close(&mut self, unused: &PageSet, state: &[u8]) -> Result<Sent, Error> {
        for run in unused.runs() {
            let end = run.end().0;
            for first in (run.first.0..end).step_by(MAX_ZERO_PAGES as usize) {
                let mut batch = PageBatch::default();
                let pages = MAX_ZERO_PAGES.min(end - first);
                batch.push(PageRun { first: PageIndex(first), pages, ..run }, Verdict::Zero);
                self.offer(batch)?;
            }
        }
        self.link.close_round(RoundKind::Final, &self.stop)?;
        self.collect()?;
        let mut end = self.end_of_section();
        encode_end(RAM_SECTION_ID, &mut end);
        end.extend_from_slice(&self.end_of_section());
        self.send(&end)?;
        self.send(state)?;
        self.link.sink().flush(&self.stop)?;
        self.link.sink().finish(&self.stop)?;
        let pages = self.link.sent_pages();
        let mut all = PageCounts::default();
        for pages in pages {
            (all.normal, all.zero) = (all.normal + pages.normal, all.zero + pages.zero);
        }
        let bytes = self.link.sink().position() + self.link.channel_bytes();
        if let Err(error) = self.link.close(&self.stop) {
            tracing::warn!(%error, "the snapshot is whole, but its connection did not end in good order");
        }
        Ok(Sent { pages: all, bytes })
    }
}
