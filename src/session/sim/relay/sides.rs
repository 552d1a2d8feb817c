//! The two sides of the relay, a step at a time.

mod held;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use self::held::{Holding, Steps};
use super::ends::Item;
use super::plan::FarKind;
use super::postcopy::{RelayPost, bit};
use super::{MAX_AHEAD, PAGES, World};
use crate::engine::{FarEnd, Handover, RelayAction, RelayEnding, RelayEvent, Traffic};
use crate::guest::DirtySource;
use crate::ram::{BlockName, PageBitmap, PageRun, RamBlock, RamBlockTable};
use crate::session::relay::forward::ForwardedPages;
use crate::session::relay::hub::{Hub, Parts};
use crate::session::{Breakage, CancelReply, Spawner};
use crate::sys::CancelToken;
use crate::units::{BlockIndex, PageIndex, PageSize};

/// Bytes per page: so large that a few pages are a backlog.
const PAGE_BYTES: u64 = 1 << 20;
/// Steps for which the far end may be silent after COMMIT.
pub(super) const FINISH_STEPS: u64 = 100;

/// State of the side towards the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Near {
    Reading,
    /// A page that is half written.
    Writing(usize, u32),
    AwaitsQuestion,
    AwaitsCommit,
    AwaitsAnswer,
    /// Postcopy: the package is here.
    AwaitsGiving,
    /// Postcopy: the source's stream has ended, and urgent pages are under way.
    AwaitsUrgent,
    /// Postcopy: the source's last page is here.
    AwaitsEnd,
    /// Postcopy: it has failed, and waits until it is decided who has the guest.
    Settling,
    Ended,
}

/// State of the side towards the far end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FarSide {
    Live,
    State,
    AwaitsReady,
    AwaitsGuest,
    AwaitsRunning(u64),
    Listens,
    /// Postcopy: the package has left, but for RUN.
    AwaitsDiscarded,
    /// Postcopy: the far end has the guest, or will; until then it may be silent.
    Filling(u64),
    Ended,
}

/// The relay's process.
pub(super) struct Relay {
    pub(super) hub: Arc<Hub>,
    clock: Arc<AtomicU64>,
    held: Arc<AtomicBool>,
    held_urgent: Arc<AtomicBool>,
    pub(super) breakage: Breakage,
    pub(super) table: RamBlockTable,
    pub(super) forwarded: ForwardedPages,
    pub(super) memory: [u32; PAGES],
    pub(super) dirty: VecDeque<usize>,
    pub(super) post: RelayPost,
    pub(super) near: Near,
    pub(super) far_side: FarSide,
    /// The source's end of the connection; `None`: it has gone.
    source: Option<UnixStream>,
    came: u64,
    pub(super) left: u64,
}

impl Relay {
    pub(super) fn new(breakage: Breakage) -> Self {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES as u64 * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        let (hub, clock) = (Arc::new(Hub::default()), Arc::new(AtomicU64::new(0)));
        let (held, held_urgent) = <(Arc<AtomicBool>, Arc<AtomicBool>)>::default();
        let (source, ours) = UnixStream::pair().unwrap();
        let holding = Holding { source: Arc::clone(&held), urgent: Arc::clone(&held_urgent) };
        let guard = (breakage != Breakage::LeaveUnguarded).then(|| Box::new(holding) as _);
        hub.begin(Parts {
            downtime_limit: Duration::from_millis(300),
            guard,
            cancel: CancelToken::default(),
            notice: Arc::new(|_| ()),
            // No thread reports anything here.
            spawner: Spawner::new(|_, _| Err(io::Error::other("none here"))),
            source: Some(OwnedFd::from(ours)),
            source_is_encrypted: false,
        });
        hub.count_time_by(Box::new(Steps(Arc::clone(&clock))));
        hub.break_order(breakage);
        Self {
            hub,
            clock,
            held,
            held_urgent,
            breakage,
            forwarded: ForwardedPages::new(&table),
            table,
            memory: [0; PAGES],
            dirty: VecDeque::new(),
            post: RelayPost::default(),
            near: Near::Reading,
            far_side: FarSide::Live,
            source: Some(source),
            came: 0,
            left: 0,
        }
    }

    pub(super) fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    pub(super) fn holds_urgent(&self) -> bool {
        self.held_urgent.load(Ordering::Relaxed)
    }

    pub(super) fn is_in_doubt(&self) -> bool {
        self.hub.lock().engine.is_in_doubt()
    }

    pub(super) fn is_given_away(&self) -> bool {
        self.hub.lock().engine.is_given_away()
    }

    /// Each end is said to keep what it has for the other.
    pub(super) fn is_incomplete(&self) -> bool {
        self.hub.lock().engine.ending() == RelayEnding::Incomplete
    }

    /// The guest is said to be at its source, for certain.
    pub(super) fn says_at_source(&self) -> bool {
        self.hub.lock().engine.ending() == RelayEnding::Failed
    }

    /// The guest is said to be at its source, or to run nowhere.
    pub(super) fn is_unanswered(&self) -> bool {
        self.hub.lock().engine.ending() == RelayEnding::Unanswered
    }

    /// The time, and what the kernel says of the source's connection.
    fn begins_step(&mut self, now: u64, source_is_gone: bool) {
        self.clock.store(now, Ordering::Relaxed);
        if source_is_gone {
            self.source = None;
        }
    }

    /// False: it is too late.
    pub(super) fn cancel(&self) -> bool {
        self.hub.cancel() == CancelReply::Accepted
    }

    pub(super) fn not_there(&self) {
        self.hub.post(RelayEvent::NotThere);
    }

    pub(super) fn has(&self, action: RelayAction) -> bool {
        self.hub.lock().has(action)
    }

    pub(super) fn mark(&self, page: usize) {
        self.forwarded.mark(PageRun { block: BlockIndex(0), first: PageIndex(page as u64), pages: 1 });
    }

    fn waiting(&self) -> u64 {
        self.forwarded.pending() + self.dirty.len() as u64
    }

    /// True if more may be read.
    fn may_read(&self, acknowledged: u64) -> bool {
        let traffic = Traffic {
            page_bytes: PAGE_BYTES,
            waiting: self.waiting(),
            whole_came: self.came,
            whole_left: self.left,
            acknowledged: acknowledged * PAGE_BYTES,
        };
        self.hub.post_quietly(RelayEvent::Moved(traffic));
        self.hub.lock().may_read()
    }

    /// Received pages are to be sent on.
    pub(super) fn sync(&mut self) {
        let mut taken = PageBitmap::new(PAGES as u64);
        self.forwarded.sync_into(BlockIndex(0), &mut taken).unwrap();
        let fresh = (0..PAGES).filter(|page| taken.get(PageIndex(*page as u64)));
        let fresh: Vec<_> = fresh.filter(|page| !self.dirty.contains(page)).collect();
        self.dirty.extend(fresh);
    }
}

impl World {
    pub(super) fn near_steps(&mut self) {
        let Some(mut relay) = self.relay.take() else { return };
        relay.begins_step(self.now, self.source.is_gone());
        if !self.source.has_return_path() && relay.near == Near::Reading && relay.came == 0 {
            relay.hub.post(RelayEvent::GivesUnasked);
        }
        self.near(&mut relay);
        if relay.is_in_doubt() {
            self.saw("in doubt");
        }
        self.relay = Some(relay);
    }

    fn near(&mut self, relay: &mut Relay) {
        match relay.near {
            Near::Ended => {}
            Near::AwaitsGiving | Near::AwaitsUrgent | Near::AwaitsEnd | Near::Settling => {
                self.near_behind_switch(relay);
            }
            Near::Reading if relay.post.switched => {
                if !self.near_is_over(relay) {
                    self.near_reads(relay);
                }
            }
            Near::Reading if relay.has(RelayAction::TellFailed) => self.near_ends(relay, Some(false)),
            Near::Reading => self.near_reads(relay),
            Near::Writing(page, value) => {
                relay.memory[page] = value;
                if relay.post.switched {
                    relay.post.arrived |= bit(page);
                }
                if relay.breakage != Breakage::MarkBeforeCopy {
                    relay.mark(page);
                }
                relay.near = Near::Reading;
            }
            Near::AwaitsQuestion if relay.has(RelayAction::AskForGuest) => {
                self.must(self.far.ready || self.plan.far == FarKind::Qemu, ASKED_EARLY);
                if self.source.is_native() {
                    self.source.asked = true;
                    relay.near = Near::AwaitsCommit;
                } else {
                    self.guest_given(relay);
                }
            }
            Near::AwaitsQuestion if relay.has(RelayAction::TellFailed) => self.near_ends(relay, Some(false)),
            Near::AwaitsCommit if self.source.wire.pop_front() == Some(Item::Commit) => {
                self.guest_given(relay);
            }
            Near::AwaitsCommit if self.source.is_gone() => self.near_ends(relay, None),
            Near::AwaitsQuestion | Near::AwaitsCommit => {}
            Near::AwaitsAnswer => {
                if relay.is_in_doubt() && self.source.is_gone() {
                    relay.hub.post(RelayEvent::SourceGone);
                }
                let answers = [
                    (RelayAction::TellRunning, Some(true)),
                    (RelayAction::TellFailed, Some(false)),
                    (RelayAction::TellNothing, None),
                ];
                if let Some((_, word)) = answers.into_iter().find(|(action, _)| relay.has(*action)) {
                    self.near_ends(relay, word);
                }
            }
        }
    }

    fn guest_given(&mut self, relay: &mut Relay) {
        relay.hub.source_is(self.source.is_native());
        relay.hub.post(RelayEvent::GuestGiven { waits: self.source.has_return_path() });
        relay.near = Near::AwaitsAnswer;
    }

    pub(super) fn near_ends(&mut self, relay: &mut Relay, word: Option<bool>) {
        if let Some(runs) = word {
            self.tell_source(runs);
        }
        if relay.is_in_doubt() {
            self.must(false, "the side towards the source ended while the guest is in doubt");
        }
        relay.hub.post(RelayEvent::SourceGone);
        relay.hub.post(RelayEvent::Told);
        relay.near = Near::Ended;
        // Nothing is reported twice, and a connection that closes now has received the report or can't receive it.
        self.source.connection_ends();
    }

    fn near_reads(&mut self, relay: &mut Relay) {
        if !relay.may_read(self.far.taken) {
            self.saw("source held back");
            return;
        }
        match self.source.wire.pop_front() {
            Some(Item::Page(page, value)) => {
                relay.came += 1;
                if relay.breakage == Breakage::MarkBeforeCopy {
                    relay.mark(page);
                }
                relay.near = Near::Writing(page, value);
                let waiting = relay.waiting();
                self.must(
                    relay.post.switched || waiting <= MAX_AHEAD,
                    "more pages wait to be sent on than the far end takes soon",
                );
            }
            Some(Item::RamEnd) => relay.hub.post(RelayEvent::RamComplete),
            Some(Item::State) => {
                relay.hub.post(RelayEvent::StateArrived);
                relay.near = Near::AwaitsQuestion;
            }
            Some(item @ (Item::Discard(_) | Item::Package | Item::End)) => self.near_switches(relay, item),
            Some(Item::Commit) => self.must(false, "the guest was given before it was asked for"),
            None if self.source.is_gone() => {
                if !self.source.has_return_path() && !relay.post.switched {
                    self.must(
                        !self.source.gave_away,
                        "a source that gave its guest away is said to have kept it",
                    );
                    self.saw("source kept its guest unasked");
                    relay.hub.post(RelayEvent::SourceKept);
                }
                self.near_ends(relay, None);
            }
            None => {}
        }
    }

    pub(super) fn far_side_steps(&mut self) {
        let Some(mut relay) = self.relay.take() else { return };
        relay.begins_step(self.now, self.source.is_gone());
        self.far_side(&mut relay);
        self.relay = Some(relay);
    }

    fn far_side(&mut self, relay: &mut Relay) {
        let before_commit = !matches!(
            relay.far_side,
            FarSide::AwaitsRunning(_) | FarSide::Listens | FarSide::Filling(_) | FarSide::Ended
        );
        if before_commit && (relay.has(RelayAction::Abandon) || self.far.is_dead()) {
            return self.far_side_ends(relay, FarEnd::DoesNotRun);
        }
        match relay.far_side {
            FarSide::AwaitsDiscarded | FarSide::Filling(_) => self.far_side_behind_switch(relay),
            FarSide::Live if !self.far.has_room() => {}
            FarSide::Live if relay.has(RelayAction::SendSwitch) && relay.dirty.is_empty() => {
                self.far_side_switches(relay);
            }
            FarSide::Live => {
                // The required order: it checks whether all pages have arrived before it takes the received pages.
                let is_last = relay.has(RelayAction::SendLastRound);
                if relay.dirty.is_empty() {
                    relay.sync();
                }
                match relay.dirty.pop_front() {
                    Some(page) => {
                        relay.left += 1;
                        self.far.wire.push_back(Item::Page(page, relay.memory[page]));
                    }
                    None if is_last => {
                        self.far.wire.push_back(Item::RamEnd);
                        relay.far_side = FarSide::State;
                    }
                    None => {}
                }
            }
            FarSide::State if relay.has(RelayAction::SendState) => {
                self.far.wire.push_back(Item::State);
                relay.far_side = FarSide::AwaitsReady;
            }
            FarSide::AwaitsReady if self.far.ready || self.plan.far == FarKind::Qemu => {
                relay.hub.far_end_takes(match self.plan.far {
                    FarKind::Qemu => Handover::Shut,
                    FarKind::Ramwire => Handover::Native,
                });
                relay.hub.post(RelayEvent::FarReady);
                relay.far_side = FarSide::AwaitsGuest;
            }
            FarSide::AwaitsGuest if relay.has(RelayAction::GiveAway) => {
                self.far.wire.push_back(Item::Commit);
                let until = self.now + FINISH_STEPS;
                relay.far_side = match relay.post.switched {
                    true => FarSide::Filling(until),
                    false => FarSide::AwaitsRunning(until),
                };
            }
            FarSide::AwaitsRunning(until) => {
                if self.hears_answer(relay) {
                    return;
                }
                if self.now >= until {
                    relay.hub.post(RelayEvent::FarSilent);
                    relay.far_side = FarSide::Listens;
                }
            }
            FarSide::Listens if relay.has(RelayAction::Abandon) => self.far_side_ends(relay, FarEnd::Unknown),
            FarSide::Listens => {
                if self.hears_answer(relay) {
                    self.saw("late answer");
                }
            }
            FarSide::Ended => self.source_hears(relay),
            FarSide::State | FarSide::AwaitsReady | FarSide::AwaitsGuest => {}
        }
    }

    /// True if the far end has answered, or its connection has ended.
    fn hears_answer(&mut self, relay: &mut Relay) -> bool {
        let end = match (self.far.answer(), self.plan.far) {
            (Some(true), _) => FarEnd::Runs,
            (Some(false), FarKind::Qemu) => FarEnd::DoesNotRun,
            (Some(false), FarKind::Ramwire) => FarEnd::Unknown,
            (None, _) if self.far.is_dead() => FarEnd::Unknown,
            (None, _) => return false,
        };
        self.far_side_ends(relay, end);
        true
    }

    pub(super) fn far_side_ends(&mut self, relay: &mut Relay, end: FarEnd) {
        relay.hub.post(RelayEvent::FarEnded(end));
        relay.far_side = FarSide::Ended;
        self.far.stream_ends();
    }
}

const ASKED_EARLY: &str = "the source was asked for its guest before the far end could take it";
