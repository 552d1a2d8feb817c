//! The received parts of a guest: its memory, the source's announcements, and the sections that are kept as they
//! arrived.

use std::sync::Arc;

use crate::guest::{GuestMemory, LayoutChange};
use crate::observe::PageCounts;
use crate::ram::{Fingerprints, RamBlock};
use crate::stream::qemu::early::NOTHING;
use crate::stream::qemu::incoming::{Event, Seen};
use crate::stream::qemu::section::PART_LEN;
use crate::sys::{CancelToken, Stop};

use super::mapper::Mapper;
use super::placing::Placing;
use super::receive::{no_blocks, out_of_turn};
use super::sections::Sections;
use super::{Incoming, IncomingObserver, Switched};
use crate::session::relay::ScanReport;
use crate::session::workers::Spawner;
use crate::session::{Breakage, Error};

/// How pages are placed in the memory that was provided.
pub(super) struct Placement<'a> {
    /// Pages may be missing when the guest starts.
    pub(super) may_be_postcopy: bool,
    /// Pages that were written through the backing file are mapped, by a thread of this spawner.
    pub(super) map_in_background: Option<&'a Spawner>,
    /// Takes the fingerprints of pages.
    pub(super) prints: Option<Arc<Fingerprints>>,
    /// Pages since the last fence are kept apart.
    pub(super) fences: bool,
    pub(super) breakage: Breakage,
}

/// The received parts, for the report.
pub(super) struct Arrived {
    pub(super) incoming: Option<Incoming>,
    pub(super) pages: PageCounts,
    pub(super) by_file: u64,
    pub(super) mapped_in_background: u64,
    pub(super) scan: Option<ScanReport>,
}

/// The part of a guest that has arrived so far.
#[derive(Default)]
pub(super) struct Ingest {
    /// Observes pages; here until there is memory for them.
    observer: Option<Box<dyn IncomingObserver>>,
    /// Once there is memory.
    placing: Option<Placing>,
    mapper: Option<Mapper>,
    /// Once the blocks were announced.
    incoming: Option<Incoming>,
    /// Sections that are kept, and the device state.
    state: Vec<u8>,
    sections: Sections,
}

impl Ingest {
    /// `arrival` observes pages as they arrive.
    pub(super) fn set_observer(&mut self, observer: Box<dyn IncomingObserver>) {
        self.observer = Some(observer);
    }

    /// Takes note of an event that is no page.
    pub(super) fn note(&mut self, event: &Event<'_>) {
        self.sections.note(event);
    }

    /// Position of the stream between its sections.
    pub(super) fn sections(&self) -> &Sections {
        &self.sections
    }

    /// Pages are placed in `memory` from now on. `known_zero` returns whether all of a block reads as zero.
    pub(super) fn place_in(
        &mut self,
        memory: Arc<dyn GuestMemory>,
        announced: &[RamBlock],
        known_zero: impl Fn(&RamBlock) -> bool,
        how: &Placement<'_>,
    ) -> Result<(), Error> {
        let observer = self.observer.take();
        let placing = Placing::new(memory, announced, known_zero, how, observer)?;
        // A page that is mapped after it was discarded would be there, as zero, and never requested.
        if let Some(spawner) = how.map_in_background.filter(|_| !how.may_be_postcopy) {
            self.mapper = Mapper::start(placing.placer(), spawner);
        }
        self.placing = Some(placing);
        Ok(())
    }

    /// What the source announced; its memory is there.
    pub(super) fn announced(&mut self, incoming: Incoming) {
        self.incoming = Some(incoming);
    }

    pub(super) fn incoming(&self) -> Option<&Incoming> {
        self.incoming.as_ref()
    }

    /// Everything has arrived: returns the source's announcements, with the properties of the sender that the stream
    /// has shown.
    pub(super) fn all_received(&mut self, seen: Seen) -> Option<&Incoming> {
        let incoming = self.incoming.as_mut()?;
        incoming.seen = seen;
        Some(incoming)
    }

    /// The placing of pages, if there is memory.
    pub(super) fn placed(&self) -> Option<&Placing> {
        self.placing.as_ref()
    }

    pub(super) fn placing(&mut self) -> Result<&mut Placing, Error> {
        self.placing.as_mut().ok_or_else(|| no_blocks("a page"))
    }

    pub(super) fn memory(&self) -> Result<Arc<dyn GuestMemory>, Error> {
        let placing = self.placing.as_ref().ok_or_else(|| no_blocks("the end of the state"))?;
        Ok(Arc::clone(placing.memory()))
    }

    /// Pages that the kernel could not keep are an error before the guest can be handed over to us.
    pub(super) fn lost_memory(&self) -> Result<(), Error> {
        match self.placing.as_ref().and_then(|placing| placing.memory().layout_change()) {
            Some(lost @ LayoutChange::Lost { .. }) => Err(lost.into()),
            _ => Ok(()),
        }
    }

    /// Before each read of the stream.
    pub(super) fn between_reads(&mut self) -> Result<(), Error> {
        let Some(placing) = &mut self.placing else { return Ok(()) };
        placing.check_faults();
        placing.between_reads()?;
        if placing.is_due() { self.lost_memory() } else { Ok(()) }
    }

    /// The early sections are complete: an observer of pages may begin.
    pub(super) fn pages_begin(&mut self, seen: Seen, section: u32) -> Result<(), Error> {
        self.lost_memory()?;
        match (&mut self.placing, &mut self.incoming) {
            (Some(placing), Some(incoming)) => {
                incoming.seen = seen;
                placing.began(incoming, section)
            }
            _ => Err(no_blocks("a section of pages")),
        }
    }

    /// True at a relay: the guest of a source that switches to postcopy runs at its far end.
    ///
    /// # Errors
    /// Such a source is refused.
    pub(super) fn relays_postcopy(&self) -> Result<bool, Error> {
        self.watcher().map_or(Ok(false), |observer| observer.relays_postcopy())
    }

    /// The source has switched to postcopy, at a relay: see [`IncomingObserver::switched`].
    pub(super) fn switched(&mut self, switched: Switched) -> Result<(), Error> {
        let observer = self.placing.as_mut().and_then(Placing::observer);
        observer.map_or_else(|| Err(no_blocks("a package")), |observer| observer.switched(switched))
    }

    /// After the switch: raised when nothing more is read from the source.
    pub(super) fn source_ends(&self) -> CancelToken {
        self.watcher().map_or_else(CancelToken::default, |observer| observer.source_ends())
    }

    /// After the switch: the last page has arrived; see [`IncomingObserver::all_came`].
    pub(super) fn all_came(&mut self) -> Result<(), Error> {
        self.placing.as_mut().and_then(Placing::observer).map_or(Ok(()), |observer| observer.all_came())
    }

    /// After the switch, at a relay: see [`IncomingObserver::settle`].
    pub(super) fn settle(&self) {
        if let Some(observer) = self.watcher() {
            observer.settle();
        }
    }

    /// After the switch: see [`IncomingObserver::source_may_be_silent`].
    pub(super) fn source_may_be_silent(&self) -> bool {
        self.watcher().is_some_and(|observer| observer.source_may_be_silent())
    }

    /// After the switch: true once the guest runs at a relay's far end.
    pub(super) fn is_taken(&self) -> bool {
        self.watcher().is_some_and(|observer| observer.is_taken())
    }

    /// After the switch: see [`IncomingObserver::has_moved`].
    pub(super) fn has_moved(&self) -> bool {
        self.watcher().is_some_and(|observer| observer.has_moved())
    }

    /// After the switch: why a relay has ended it.
    pub(super) fn why_ended(&self) -> Option<Error> {
        self.watcher().and_then(|observer| observer.why_ended())
    }

    /// The observer of pages.
    fn watcher(&self) -> Option<&dyn IncomingObserver> {
        let here = self.observer.as_deref();
        here.or_else(|| self.placing.as_ref().and_then(Placing::watcher))
    }

    /// A round of pages that show only by their content is over.
    pub(super) fn scan(&mut self, spawner: &Spawner, stop: &Stop) -> Result<(), Error> {
        self.placing.as_mut().map_or(Ok(()), |placing| placing.scan(spawner, stop))
    }

    /// No page is mapped during the downtime, which that would prolong.
    pub(super) fn stop_mapping(&self) {
        if let Some(mapper) = &self.mapper {
            mapper.stop();
        }
    }

    /// The last page has arrived.
    pub(super) fn ram_complete(&mut self) -> Result<(), Error> {
        let placing = self.placing.as_mut().ok_or_else(|| no_blocks("the end of RAM"))?;
        placing.ram_complete()
    }

    /// The connection is lost: partially received host pages will be sent again.
    pub(super) fn forget_parts(&mut self) {
        if let Some(placing) = &mut self.placing {
            placing.forget_parts();
        }
    }

    /// The guest runs on at its source, which has connected again: the end of RAM and what came behind it count no more.
    pub(super) fn forget_switchover(&mut self, breakage: Breakage) -> Result<(), Error> {
        if !breakage.is(Breakage::KeepOldState) {
            self.state.clear();
        }
        self.sections.forget_switchover();
        self.placing()?.another_connection();
        Ok(())
    }

    /// An observer sees each page as it arrives.
    pub(super) fn is_watched(&self) -> bool {
        self.observer.is_some() || self.placing.as_ref().is_some_and(Placing::is_watched)
    }

    /// The device state, and the bytes that are kept with it.
    pub(super) fn state(&self) -> &[u8] {
        &self.state
    }

    pub(super) fn take_state(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.state)
    }

    /// The device sections have arrived completely.
    pub(super) fn device_sections(&mut self, bytes: &[u8]) {
        self.state.extend_from_slice(bytes);
    }

    /// Keeps a piece of a section that is not RAM and not interpreted; `limit` bytes of them at most.
    pub(super) fn keep(&mut self, raw: &[u8], limit: u64) -> Result<(), Error> {
        let kept = self.kept();
        if (kept.len() + raw.len()) as u64 > limit {
            return Err(out_of_turn("more device state than is accepted", "a precopy migration"));
        }
        kept.extend_from_slice(raw);
        Ok(())
    }

    /// The start of such a section.
    pub(super) fn keep_start(&mut self, raw: &[u8], limit: u64) -> Result<(), Error> {
        let at = self.kept().len();
        self.sections.carried_from(at);
        self.keep(raw, limit)
    }

    /// The end of a PART. One that holds nothing but the mark of its end is dropped: a QEMU with dirty bitmaps writes one
    /// with every section of pages, thousands in a second.
    pub(super) fn keep_part_end(&mut self, raw: &[u8], limit: u64) -> Result<(), Error> {
        let at = self.sections.carried_at();
        let kept = self.kept();
        if kept.get(at + PART_LEN..) == Some(&NOTHING[..]) {
            kept.truncate(at);
            return Ok(());
        }
        self.keep(raw, limit)
    }

    /// The buffer for such a section: the early sections until the first page, the device state after the last one. By
    /// then a relay has passed the early ones on.
    fn kept(&mut self) -> &mut Vec<u8> {
        match &mut self.incoming {
            Some(incoming) if !self.sections.pages_began() => &mut incoming.early_sections,
            _ => &mut self.state,
        }
    }

    /// The migration has ended: ends the mapping thread. Returns the received parts.
    pub(super) fn finish(&mut self) -> Arrived {
        let mapped_in_background = self.mapper.take().map_or(0, Mapper::finish);
        let placing = self.placing.as_ref();
        Arrived {
            incoming: self.incoming.take(),
            pages: placing.map_or_else(PageCounts::default, Placing::counts),
            by_file: placing.map_or(0, |placing| placing.placer().by_file()),
            mapped_in_background,
            scan: placing.and_then(Placing::scan_report),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::session::tests::guest;
    use crate::stream::qemu::file::Configuration;
    use crate::stream::qemu::incoming::SectionKind;
    use crate::stream::qemu::section::Phase;
    use crate::units::{BlockIndex, BlockOffset};

    const LIMIT: u64 = 100;

    /// The blocks were announced.
    fn announced() -> Ingest {
        let mut ingest = Ingest::default();
        ingest.announced(Incoming {
            configuration: Configuration::default(),
            blocks: Vec::new(),
            vmm_configuration: Vec::new(),
            passed: Vec::new(),
            early_sections: Vec::new(),
            has_return_path: true,
            gives_unasked: false,
            seen: Seen::default(),
        });
        ingest
    }

    fn early(ingest: &Ingest) -> &[u8] {
        &ingest.incoming().unwrap().early_sections
    }

    #[test]
    fn sections_in_front_of_the_first_page_are_kept_apart_from_device_state() {
        let mut ingest = announced();
        ingest.keep_start(b"early", LIMIT).unwrap();
        ingest.note(&Event::SectionStart { phase: Phase::Part, id: 2, kind: SectionKind::Ram });
        ingest.keep_start(b"state", LIMIT).unwrap();
        ingest.keep(b", more", LIMIT).unwrap();
        assert_eq!((early(&ingest), ingest.state()), (&b"early"[..], &b"state, more"[..]));
    }

    #[test]
    fn no_more_is_kept_than_is_accepted() {
        let mut ingest = announced();
        ingest.keep_start(&[7; 60], LIMIT).unwrap();
        ingest.keep(&[7; 40], LIMIT).unwrap();
        let refused = ingest.keep(&[7], LIMIT);
        assert!(matches!(refused, Err(Error::OutOfTurn { .. })), "{refused:?}");
        assert_eq!(early(&ingest).len() as u64, LIMIT, "what was refused is not kept");
    }

    #[test]
    fn a_part_that_says_nothing_is_dropped() {
        let mut ingest = announced();
        ingest.keep_start(b"before", LIMIT).unwrap();
        for (says, kept) in [(&NOTHING[..], 0), (b"something", PART_LEN + b"something+end".len())] {
            let before = early(&ingest).len();
            ingest.keep_start(&[3; PART_LEN], LIMIT).unwrap();
            ingest.keep(says, LIMIT).unwrap();
            ingest.keep_part_end(b"+end", LIMIT).unwrap();
            assert_eq!(early(&ingest).len() - before, kept);
        }
        assert!(early(&ingest).starts_with(b"before"));
    }

    #[test]
    fn pages_without_blocks_are_out_of_turn() {
        let mut ingest = Ingest::default();
        assert!(ingest.placing().is_err() && ingest.memory().is_err() && ingest.ram_complete().is_err());
        assert!(ingest.pages_begin(Seen::default(), 2).is_err());
        assert!(ingest.lost_memory().is_ok() && ingest.between_reads().is_ok(), "there is none to be lost");
    }

    #[test]
    fn a_page_is_placed_and_counted_in_the_memory_that_was_provided() {
        let (mut ingest, memory) = (announced(), guest(&[2]));
        let blocks = memory.table().blocks().to_vec();
        let how = Placement {
            may_be_postcopy: false,
            map_in_background: None,
            prints: None,
            fences: false,
            breakage: Breakage::default(),
        };
        ingest.place_in(memory.clone(), &blocks, |_| true, &how).unwrap();
        ingest.placing().unwrap().pages(BlockIndex(0), BlockOffset(4096), &[9; 4096], &[]).unwrap();
        let arrived = ingest.finish();
        assert_eq!((arrived.pages.normal, arrived.mapped_in_background), (1, 0));
        assert!(arrived.incoming.is_some());
        assert_eq!(crate::session::tests::bytes(&memory, 0), [[0; 4096], [9; 4096]].concat());
    }
}
