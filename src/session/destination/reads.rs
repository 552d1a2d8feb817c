//! Missing pages that this end reads from its source's memory (RDMA READ): the source sends keys, and no page.
//!
//! The pager ([`Filling`]) reads and places them: those that threads wait for, those behind them, the rest. One more
//! thread tells the source which of its keys are no longer needed, so that no page waits for a source that is stopped.
//!
//! # Order that must hold
//!
//! The end of this precedes another connection: its threads go on with what is outstanding.

use std::sync::Arc;
use std::thread::JoinHandle;

use crate::engine::{BlockToFill, Fill, Pager};
use crate::error::Chain;
use crate::guest::Placer;
use crate::ram::{PageBitmap, PageSet};
use crate::stream::native::{Answer, ReadKey};
use crate::stream::qemu::return_path::Message;
use crate::sys::{Job, MissingFaults};
use crate::transport::{ChannelError, PageSpan, PulledPages, RemoteSpan};
use crate::units::{BlockIndex, BlockOffset};

use super::DestinationSession;
use super::postcopy::Shared;
use super::receive::out_of_turn;
use crate::session::pager::{Filling, GuestPages, News};
use crate::session::{DestinationSettings, Error};

/// The threads that read, and what they share.
pub(super) struct Reads {
    filling: Arc<Filling>,
    supply: Arc<dyn PulledPages>,
    threads: Vec<JoinHandle<()>>,
}

impl Reads {
    /// From here on faults are served. No page is read before there is a key for it.
    pub(super) fn start(
        shared: &Arc<Shared>,
        faults: &Arc<MissingFaults>,
        supply: Arc<dyn PulledPages>,
        missing: &PageSet,
        settings: &DestinationSettings,
    ) -> Result<Self, Error> {
        let table = shared.placer.memory().table();
        let blocks = (0..).map(BlockIndex).zip(table.blocks()).map(|(index, block)| BlockToFill {
            present: missing.block(index).cloned().unwrap_or_else(|| PageBitmap::new(table.pages_of(block))),
            host_page: block.host_page,
        });
        let mut fill = Fill::new(table.page(), blocks.collect()).withheld();
        fill.open();
        let memory = GuestPages::new(Arc::clone(&shared.placer), Arc::clone(faults));
        let memory = memory.used_by(settings.vcpu_threads.clone());
        let filling = Filling::by(Box::new(memory), Arc::clone(&supply) as Arc<_>, table.page(), fill);
        let filling = filling.limited(settings.max_read_bandwidth).since(shared.began);
        let mut this = Self { filling: Arc::new(filling), supply, threads: Vec::new() };
        let (serves, reads, tells) =
            (Arc::clone(&this.filling), Arc::clone(&this.filling), Arc::clone(&this.filling));
        let shared = Arc::clone(shared);
        let jobs: [(&'static str, Job); 3] = [
            ("ramwire-faults", Box::new(move || serves.serve_faults())),
            ("ramwire-reads", Box::new(move || reads.read_rest())),
            ("ramwire-keys", Box::new(move || tell_source(&tells, &shared))),
        ];
        for (name, job) in jobs {
            this.threads.push(settings.spawner.spawn(name, job)?);
        }
        Ok(this)
    }

    /// The source lets this end read more of its memory.
    fn grant(&self, key: ReadKey, placer: &Placer) -> Result<(), Error> {
        let wrong = || out_of_turn(&format!("a key that can't be ({key:?})"), "reading missing pages");
        let landing = placer.admit(BlockIndex(key.block), BlockOffset(key.start), key.len);
        let landing = landing.map_err(|error| {
            out_of_turn(&format!("a key of other memory ({})", Chain(&error)), "reading missing pages")
        })?;
        let (run, page) = (placer.run(landing), placer.page_bytes());
        if key.len == 0 || !key.start.is_multiple_of(page) || !key.len.is_multiple_of(page) {
            return Err(wrong());
        }
        if !self.filling.state().keys.may_add(key.number, run) {
            return Err(wrong());
        }
        let span = PageSpan { block: landing.block(), offset: landing.offset().0, len: landing.len() };
        self.supply.grant(RemoteSpan { span, address: key.address, rkey: key.rkey });
        self.filling.change(|state| {
            let missing = state.fill.grant(run);
            state.keys.add(key.number, run, missing);
        });
        Ok(())
    }

    /// No page is missing.
    pub(super) fn is_whole(&self) -> bool {
        self.filling.state().fill.is_whole()
    }

    /// Why pages can't be read any more; told once.
    pub(super) fn take_failure(&self) -> Option<ChannelError> {
        self.supply.take_failure()
    }

    /// Ends the threads. Returns the pages that are outstanding, with the figures of the faults.
    pub(super) fn end(mut self) -> Pager {
        self.end_threads();
        self.filling.change(|state| state.fill.take_pager())
    }

    fn end_threads(&mut self) {
        self.supply.end();
        self.filling.end();
        for thread in self.threads.drain(..) {
            // A panic there was reported where it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        self.end_threads();
    }
}

/// Tells the source what it needs to know, until no page is missing.
fn tell_source(filling: &Filling, shared: &Shared) {
    while let Some(news) = filling.next_news() {
        let stop = shared.stop();
        let told = match news {
            News::Whole(number) => shared.back.message(Message::Native(Answer::ReadWhole { number }), &stop),
            News::Wanted(page) => match shared.placer.memory().table().admit_run(page) {
                Ok(landing) => shared.back.ask(&shared.placer, landing, &stop),
                Err(_) => Ok(()),
            },
        };
        if let Err(error) = told {
            tracing::warn!(%error, "the source could not be told which pages are here");
            break;
        }
    }
    if !filling.state().fill.is_whole() {
        shared.lose_connection();
    }
}

impl DestinationSession {
    /// The source lets this end read missing pages.
    pub(super) fn read_keys(&mut self, keys: &[u8]) -> Result<(), Error> {
        let postcopy = self.switch.running();
        let Some((postcopy, reads)) =
            postcopy.and_then(|postcopy| Some((postcopy, postcopy.reads.as_ref()?)))
        else {
            return Err(out_of_turn("READ_KEYS", "a connection on which no page is read"));
        };
        ReadKey::decode_all(keys).try_for_each(|key| reads.grant(key, &postcopy.shared.placer))
    }

    /// True while pages are read: the source need not send anything meanwhile.
    pub(super) fn is_reading(&self) -> bool {
        let reads = self.switch.running().and_then(|postcopy| postcopy.reads.as_ref());
        reads.is_some_and(|reads| !reads.is_whole())
    }

    /// True if all missing pages were read: nothing of the source is needed any more.
    pub(super) fn has_read_all(&self) -> bool {
        let reads = self.switch.running().and_then(|postcopy| postcopy.reads.as_ref());
        reads.is_some_and(Reads::is_whole)
    }
}
