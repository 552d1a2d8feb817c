//! A relay whose source switches to postcopy: what each party does from there on.

mod far;

use std::collections::VecDeque;

use super::ends::{Item, ROOM};
use super::plan::{FarKind, Plan};
use super::sides::{FarSide, Near, Relay};
use super::urgent::{RelayUrgent, SourceUrgent};
use super::{PAGES, World};
use crate::engine::{FarEnd, Handover, RelayAction, RelayEvent};
use crate::ram::{PageRun, PageSet};
use crate::session::Breakage;
use crate::session::destination::Switched;
use crate::session::relay::owed::Owed;
use crate::units::{BlockIndex, PageIndex};

/// A lazy source sends what nobody asks for from this step on.
const LAZY_UNTIL: u64 = 5000;
/// Steps for which a thread of the guest may wait for a page if nothing is wrong.
const PATIENCE: u64 = 1800;
/// All pages.
const ALL: u64 = (1 << PAGES) - 1;

pub(super) fn bit(page: usize) -> u64 {
    1 << page
}

fn pages_of(mask: u64) -> impl Iterator<Item = usize> {
    (0..PAGES).filter(move |page| mask & bit(*page) != 0)
}

fn run_of(page: usize) -> PageRun {
    PageRun { block: BlockIndex(0), first: PageIndex(page as u64), pages: 1 }
}

/// The source's part.
#[derive(Default)]
pub(super) struct SourcePost {
    pub(super) old: bool,
    /// Pages that have left before the switch.
    pub(super) left: u64,
    pub(super) switched: bool,
    owed: Vec<usize>,
    asked: VecDeque<usize>,
    /// The answer that the guest was taken is on its way.
    on_its_way: bool,
    pub(super) taken: bool,
    ended: bool,
    /// Its connection for urgent pages.
    pub(super) urgent: SourceUrgent,
}

impl SourcePost {
    pub(super) fn new(old: bool) -> Self {
        Self { old, ..Self::default() }
    }

    /// The connection ended: what was on its way does not arrive. True if it was the answer.
    pub(super) fn answer_lost(&mut self) -> bool {
        std::mem::take(&mut self.on_its_way)
    }

    /// What is on its way arrives.
    pub(super) fn hears(&mut self) {
        self.taken |= std::mem::take(&mut self.on_its_way);
    }
}

/// The far end's part.
pub(super) struct FarPost {
    pub(super) switched: bool,
    present: u64,
    discarded: bool,
    package: bool,
    /// Its answer that it takes the guest was not read yet.
    pub(super) took: bool,
    taken: bool,
    loads: usize,
    /// Pages that the guest touches, in this order.
    touches: VecDeque<usize>,
    requests: VecDeque<usize>,
    /// The page that is waited for, since when.
    waits: Option<(usize, u64)>,
    ended: bool,
    pub(super) complete: bool,
    /// Its connection is broken: nothing that it says is heard.
    cut: bool,
    /// On its connection for urgent pages.
    pub(super) urgent: VecDeque<Item>,
}

impl FarPost {
    pub(super) fn new(plan: &Plan) -> Self {
        let touches = (0..PAGES).map(|page| (page * 7 + plan.loads) % PAGES);
        Self {
            switched: false,
            present: 0,
            discarded: false,
            package: false,
            took: false,
            taken: false,
            loads: plan.loads,
            touches: touches.collect(),
            requests: VecDeque::new(),
            waits: None,
            ended: false,
            complete: false,
            cut: false,
            urgent: VecDeque::new(),
        }
    }

    /// It can't load the device state, since a page is missing that does not come.
    pub(super) fn is_stuck(&self) -> bool {
        self.switched && !self.taken && self.present & bit(self.loads) == 0
    }

    /// A thread waits for `page`; asks for it once.
    fn wait_for(&mut self, page: usize, now: u64) {
        if self.waits.is_none_or(|(known, _)| known != page) {
            self.waits = Some((page, now));
            self.requests.push_back(page);
        }
    }
}

/// The relay's part.
#[derive(Default)]
pub(super) struct RelayPost {
    /// The source's package is here.
    pub(super) switched: bool,
    pub(super) discards: u64,
    /// Pages that came behind the switch.
    pub(super) arrived: u64,
    pub(super) owed: Owed,
    pub(super) urgent: RelayUrgent,
    told_taken: bool,
    source_knows: bool,
    ended: bool,
}

impl World {
    pub(super) fn source_switches(&mut self) {
        self.saw("switched to postcopy");
        let source = &mut self.source;
        (source.runs, source.gave_away, source.post.switched) = (false, true, true);
        source.post.owed = source.dirty.drain(..).collect();
        let mask = source.post.owed.iter().fold(0, |mask, page| mask | bit(*page));
        source.wire.push_back(Item::Discard(mask));
        source.wire.push_back(Item::Package);
    }

    pub(super) fn source_behind_switch(&mut self) {
        let source = &mut self.source;
        if self.rng.one_in(self.plan.answer_takes) {
            source.post.hears();
        }
        let has_room = source.wire.len() < ROOM && source.post.urgent.has_room();
        if source.closed || !source.post.switched || !has_room {
            return;
        }
        let post = &mut source.post;
        // A request is on its way about as long as an answer, in the plans that have connections for urgent pages.
        let hears = !self.plan.preempt || self.rng.one_in(self.plan.answer_takes.min(10));
        let mut heard = std::iter::from_fn(|| hears.then(|| post.asked.pop_front()).flatten());
        let asked = heard.find(|page| post.owed.contains(page));
        let background = || post.owed.first().copied().filter(|_| !self.plan.lazy || self.now >= LAZY_UNTIL);
        if let Some(page) = asked.filter(|_| self.plan.preempt) {
            post.owed.retain(|owed| *owed != page);
            self.source_sends_urgent(page);
        } else if let Some(page) = asked.or_else(background) {
            post.owed.retain(|owed| *owed != page);
            source.wire.push_back(Item::Page(page, source.memory[page]));
        } else if post.owed.is_empty() && (post.taken || post.old) && !post.ended {
            post.ended = true;
            source.wire.push_back(Item::End);
        }
    }

    /// The relay tells the source that its guest was taken.
    pub(super) fn tell_taken(&mut self) {
        self.must(self.far.post.taken, "the source was told that its guest was taken before it was");
        self.source.post.on_its_way |= !self.source.closed;
    }

    pub(super) fn near_switches(&mut self, relay: &mut Relay, item: Item) {
        match item {
            Item::Discard(mask) => relay.post.discards |= mask,
            Item::Package => {
                let mut owed = PageSet::new(&relay.table);
                pages_of(relay.post.discards).for_each(|page| _ = owed.add(run_of(page)));
                relay.forwarded.switch();
                relay.post.switched = true;
                let urgent = relay.urgent_descriptors(self.plan.preempt);
                relay.hub.source_has_switched(Switched {
                    state: Vec::new(),
                    owed,
                    waits: !self.plan.old,
                    source: None,
                    urgent,
                });
                relay.near = Near::AwaitsGiving;
            }
            _ => self.near_reads_end(relay),
        }
    }

    pub(super) fn near_behind_switch(&mut self, relay: &mut Relay) {
        match relay.near {
            Near::AwaitsGiving if relay.has(RelayAction::GiveAway) => relay.near = Near::Reading,
            Near::AwaitsEnd if relay.has(RelayAction::TellRunning) => {
                self.saw("whole in postcopy");
                self.near_ends(relay, Some(true));
            }
            Near::AwaitsUrgent if relay.all_came() => relay.near = Near::AwaitsEnd,
            Near::Settling => self.near_settles(relay),
            _ => _ = self.near_is_over(relay),
        }
    }

    /// True if nothing more is read from the source.
    pub(super) fn near_is_over(&mut self, relay: &mut Relay) -> bool {
        let awaits_giving = relay.near == Near::AwaitsGiving && relay.breakage != Breakage::GiveToGone;
        if (awaits_giving || relay.is_in_doubt()) && self.source.is_gone() {
            relay.hub.post(RelayEvent::SourceGone);
        }
        if relay.has(RelayAction::TellFailed) {
            self.near_ends(relay, Some(false));
        } else if relay.has(RelayAction::TellNothing) {
            self.near_ends(relay, None);
        } else if relay.has(RelayAction::Part) {
            self.saw("the ends were left to each other");
            self.near_ends(relay, None);
        } else {
            return false;
        }
        true
    }

    pub(super) fn far_side_switches(&mut self, relay: &mut Relay) {
        let Some(switched) = relay.hub.take_switch() else { return };
        relay.sync();
        relay.post.owed = Owed::new(&relay.table, switched.owed);
        let here = relay.dirty.iter().fold(0, |mask, page| mask | bit(*page));
        self.far.wire.push_back(Item::Discard(here | relay.post.discards));
        if relay.breakage == Breakage::ForgetOwed {
            relay.dirty.extend(pages_of(relay.post.discards & !here));
        } else {
            relay.dirty.retain(|page| relay.post.discards & bit(*page) == 0);
        }
        self.far.wire.push_back(Item::Package);
        relay.far_side = FarSide::AwaitsDiscarded;
    }

    pub(super) fn far_side_behind_switch(&mut self, relay: &mut Relay) {
        match relay.far_side {
            FarSide::AwaitsDiscarded if self.far.post.discarded => {
                relay.hub.far_end_takes(match self.plan.far {
                    FarKind::Qemu => Handover::Shut,
                    FarKind::Ramwire => Handover::Native,
                });
                relay.hub.post(RelayEvent::FarReady);
                relay.far_side = FarSide::AwaitsGuest;
            }
            FarSide::Filling(until) => self.fill(relay, until),
            _ => {}
        }
    }

    /// The relay looks whether the source has the answer that its guest was taken.
    pub(super) fn source_hears(&mut self, relay: &mut Relay) {
        if relay.post.told_taken && !relay.post.source_knows && self.source.post.taken {
            relay.post.source_knows = true;
            relay.hub.post(RelayEvent::SourceKnows);
        }
    }

    fn fill(&mut self, relay: &mut Relay, until: u64) {
        if std::mem::take(&mut self.far.post.took) {
            relay.hub.post(RelayEvent::FarTook);
        }
        if relay.has(RelayAction::TellTaken) && !relay.post.told_taken {
            relay.post.told_taken = true;
            self.tell_taken();
            return;
        }
        self.source_hears(relay);
        match self.far.answer() {
            Some(true) => return self.far_side_ends(relay, FarEnd::Runs),
            Some(false) => return self.far_side_ends(relay, FarEnd::DoesNotRun),
            None if self.far.is_dead() || self.far.ended || relay.has(RelayAction::Abandon) => {
                return self.far_side_ends(relay, FarEnd::Unknown);
            }
            None => {}
        }
        if self.now >= until && !relay.has(RelayAction::TellTaken) {
            relay.hub.post(RelayEvent::FarSilent);
        }
        self.pass_requests(relay);
        for run in relay.forwarded.take_queue() {
            for came in relay.post.owed.came(run) {
                let pages = (came.run.first.0..came.run.end().0).map(|page| page as usize);
                pages.for_each(|page| match came.asked {
                    true if self.plan.preempt => relay.post.urgent.asked.push_back(page),
                    true => relay.dirty.push_front(page),
                    false => relay.dirty.push_back(page),
                });
            }
        }
        self.send_missing(relay);
    }

    fn pass_requests(&mut self, relay: &mut Relay) {
        while let Some(page) = self.far.post.requests.pop_front() {
            match relay.post.owed.ask(run_of(page)) {
                Some(_) if relay.breakage == Breakage::AskNobody => {}
                Some(due) => {
                    self.saw("asked for what the relay did not have");
                    self.source.post.asked.extend(due.iter().map(|run| run.first.0 as usize));
                }
                None => {
                    if let Some(at) = relay.dirty.iter().position(|dirty| *dirty == page) {
                        relay.dirty.remove(at);
                        match relay.breakage {
                            Breakage::LoseRequested => {}
                            _ if self.plan.preempt => relay.post.urgent.asked.push_back(page),
                            _ => relay.dirty.push_front(page),
                        }
                    }
                }
            }
        }
    }

    fn send_missing(&mut self, relay: &mut Relay) {
        if self.sends_urgent(relay) || !self.far.has_room() {
            return;
        }
        let all = relay.post.owed.left() == 0
            || relay.breakage == Breakage::EndWithoutSource
            || relay.breakage == Breakage::EndWithMain && relay.near == Near::AwaitsUrgent;
        if let Some(page) = relay.dirty.pop_front() {
            relay.left += 1;
            self.far.wire.push_back(Item::Page(page, relay.memory[page]));
        } else if all && relay.has(RelayAction::TellTaken) && !relay.post.ended {
            relay.post.ended = true;
            self.far.wire.push_back(Item::End);
        }
    }

    /// What the far end receives at the switch.
    pub(super) fn far_switches(&mut self, item: Item) {
        let far = &mut self.far;
        match item {
            Item::Discard(mask) => {
                (far.post.switched, far.post.discarded) = (true, true);
                // What it has by now came before the discard.
                far.post.present = pages_of(ALL & !mask).filter(|page| far.memory[*page] != 0).map(bit).sum();
                pages_of(mask).for_each(|page| far.memory[page] = 0);
            }
            Item::Package => far.post.package = true,
            _ => far.post.ended = true,
        }
    }

    pub(super) fn far_behind_switch(&mut self) {
        let urgent = self.plan.preempt && self.far.committed && self.rng.one_in(2);
        let far = &mut self.far;
        let next = if urgent { far.post.urgent.pop_front() } else { None };
        match next.or_else(|| far.wire.pop_front()) {
            Some(Item::Page(page, value)) => {
                let newest = value == self.source.memory[page];
                self.must(newest, "a page that is older than a discard came after it");
                self.far.memory[page] = value;
                self.far.post.present |= bit(page);
                self.far.taken += 1;
            }
            Some(Item::Commit) => self.far.committed = self.far.post.package,
            Some(Item::End) => {
                let under_way = self.urgent_under_way();
                let all = self.far.post.present | under_way == ALL;
                self.must(all, "the stream ended while pages were missing");
                self.far.post.ended = true;
            }
            Some(item) => self.far_switches(item),
            None if self.far.ended && !self.far.committed => self.far.dead = true,
            None => {}
        }
        if self.far.committed && !self.far.post.taken {
            self.far_loads();
        } else if self.far.runs {
            self.far_guest_steps();
        }
        if self.far.post.cut {
            self.far.answers_close();
        }
    }
}
