//! The guest's source and the far end, as seen by a relay.

use std::collections::VecDeque;

use super::plan::{FarKind, Plan, SourceKind};
use super::postcopy::{FarPost, SourcePost};
use super::{PAGES, World};

/// What travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Item {
    Page(usize, u32),
    RamEnd,
    State,
    Commit,
    /// Postcopy: pages that come again, a bit for each.
    Discard(u64),
    /// Postcopy: the package; from a source with RUN, from the relay without it.
    Package,
    /// Postcopy: no page is left.
    End,
}

/// Maximum number of items in flight: a socket's buffer.
pub(super) const ROOM: usize = 4;

/// The guest's source.
pub(super) struct Source {
    pub(super) kind: SourceKind,
    pub(super) runs: bool,
    pub(super) dead: bool,
    pub(super) gave_away: bool,
    /// It has closed its side of the connection, or noticed that the other end did.
    pub(super) closed: bool,
    pub(super) memory: [u32; PAGES],
    pub(super) dirty: VecDeque<usize>,
    pub(super) post: SourcePost,
    rounds: u64,
    stamp: u32,
    ram_ended: bool,
    state_sent: bool,
    pub(super) asked: bool,
    pub(super) wire: VecDeque<Item>,
}

impl Source {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            kind: plan.source,
            runs: true,
            dead: false,
            gave_away: false,
            closed: false,
            memory: std::array::from_fn(|page| page as u32 + 1),
            dirty: (0..PAGES).collect(),
            post: SourcePost::new(plan.old),
            rounds: plan.rounds,
            stamp: 1000,
            ram_ended: false,
            state_sent: false,
            asked: false,
            wire: VecDeque::new(),
        }
    }

    /// The relay notices that it has disconnected.
    pub(super) fn is_gone(&self) -> bool {
        self.closed
    }

    pub(super) fn has_return_path(&self) -> bool {
        self.kind != SourceKind::OneWay
    }

    pub(super) fn is_native(&self) -> bool {
        self.kind == SourceKind::Ramwire
    }

    /// Its host dies.
    pub(super) fn dies(&mut self) {
        (self.dead, self.runs, self.closed) = (true, false, true);
    }

    /// Its connection breaks. What it has sent still arrives, what it was told does not.
    pub(super) fn is_cut(&mut self) {
        if !self.closed {
            self.post.answer_lost();
            self.loses();
        }
    }

    /// From its view the migration has failed.
    fn fails(&mut self) {
        self.wire.clear();
        self.loses();
    }

    fn loses(&mut self) {
        self.closed = true;
        if self.post.switched {
            // Without the answer that the guest was taken a QEMU from 10.2 on takes it back; a ramwire is in doubt.
            let resumes = self.kind == SourceKind::Qemu && !self.post.old && !self.post.taken;
            self.runs |= resumes && !self.dead;
            return;
        }
        // A ramwire never resumes a guest that it handed over; a source that expects no answer has released it.
        let resumes = !self.gave_away || self.kind == SourceKind::Qemu;
        self.runs |= resumes && !self.dead;
    }

    /// The connection closes without an answer.
    pub(super) fn connection_ends(&mut self) {
        if !self.closed {
            self.post.answer_lost();
            self.fails();
        }
    }

    /// What became of the guest.
    pub(super) fn told(&mut self, runs: bool) {
        if self.closed || !self.has_return_path() {
            return;
        }
        if self.post.switched && !runs {
            (self.closed, self.post.taken) = (true, self.post.taken || self.post.answer_lost());
            self.wire.clear();
            self.runs |= !self.post.old && !self.post.taken && !self.dead;
            return;
        }
        if runs { self.closed = true } else { self.fails() }
    }
}

impl World {
    pub(super) fn source_steps(&mut self) {
        let source = &mut self.source;
        if source.closed || source.post.switched || source.wire.len() >= ROOM {
            return self.source_behind_switch();
        }
        if source.runs && source.stamp < 1050 && self.rng.one_in(2) {
            // The guest writes.
            let page = self.rng.below(PAGES as u64 / 4) as usize;
            source.stamp += 1;
            source.memory[page] = source.stamp;
            if !source.dirty.contains(&page) {
                source.dirty.push_back(page);
            }
        }
        if source.runs && self.plan.switch.is_some_and(|after| source.post.left >= after) {
            return self.source_switches();
        }
        if let Some(page) = source.dirty.pop_front() {
            source.post.left += 1;
            source.wire.push_back(Item::Page(page, source.memory[page]));
            return;
        }
        if source.rounds > 0 || source.runs {
            source.rounds = source.rounds.saturating_sub(1);
            source.runs = source.rounds > 0;
            return;
        }
        if !source.ram_ended {
            source.ram_ended = true;
            source.wire.push_back(Item::RamEnd);
        } else if !source.state_sent {
            source.state_sent = true;
            source.wire.push_back(Item::State);
            // The last byte of a QEMU's state hands over the guest.
            source.gave_away = source.kind != SourceKind::Ramwire;
        } else if source.kind == SourceKind::Ramwire && source.asked && !source.gave_away {
            source.gave_away = true;
            source.wire.push_back(Item::Commit);
        }
    }
}

/// The far end.
pub(super) struct Far {
    pub(super) kind: FarKind,
    pub(super) runs: bool,
    pub(super) ran: bool,
    pub(super) dead: bool,
    /// No bytes follow those on the wire.
    pub(super) ended: bool,
    pub(super) memory: [u32; PAGES],
    pub(super) post: FarPost,
    state: bool,
    pub(super) ready: bool,
    pub(super) refuses: bool,
    pub(super) thinks: u64,
    pub(super) committed: bool,
    pub(super) slowness: u64,
    pub(super) wire: VecDeque<Item>,
    /// True: it runs. False: it does not run.
    pub(super) answers: VecDeque<bool>,
    pub(super) taken: u64,
}

impl Far {
    pub(super) fn new(plan: &Plan) -> Self {
        Self {
            kind: plan.far,
            runs: false,
            ran: false,
            dead: false,
            ended: false,
            memory: [0; PAGES],
            post: FarPost::new(plan),
            state: false,
            ready: false,
            refuses: plan.far_refuses,
            thinks: plan.far_thinks,
            committed: false,
            slowness: plan.far_slowness,
            wire: VecDeque::new(),
            answers: VecDeque::new(),
            taken: 0,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.wire.len() < ROOM
    }

    pub(super) fn is_dead(&self) -> bool {
        self.dead
    }

    /// Its host dies, together with the guest.
    pub(super) fn dies(&mut self) {
        (self.dead, self.runs) = (true, false);
        self.answers.clear();
        self.wire.clear();
        self.post.took = false;
    }

    /// The relay's process is gone, or its side has ended.
    pub(super) fn stream_ends(&mut self) {
        self.ended = true;
    }

    /// Its answers have no reader any more.
    pub(super) fn answers_close(&mut self) {
        self.answers.clear();
        self.post.took = false;
    }

    /// Its next answer.
    pub(super) fn answer(&mut self) -> Option<bool> {
        self.answers.pop_front()
    }

    /// It fails: the guest will not run here.
    pub(super) fn refuses(&mut self) {
        self.answers.push_back(false);
        self.dead = true;
    }
}

impl World {
    pub(super) fn far_steps(&mut self) {
        if self.far.dead || !self.rng.one_in(self.far.slowness) {
            return;
        }
        if self.far.post.switched {
            return self.far_behind_switch();
        }
        if self.far.runs {
            return;
        }
        let far = &mut self.far;
        if far.committed {
            if far.thinks > 0 {
                far.thinks -= 1;
            } else if far.kind == FarKind::Qemu && far.refuses {
                far.refuses();
            } else {
                self.guest_starts();
            }
            return;
        }
        match far.wire.pop_front() {
            Some(Item::Page(page, value)) => {
                far.memory[page] = value;
                far.taken += 1;
            }
            Some(item @ (Item::Discard(_) | Item::Package | Item::End)) => self.far_switches(item),
            Some(Item::State) => {
                far.state = true;
                if far.kind == FarKind::Ramwire && far.refuses {
                    far.refuses();
                } else {
                    far.ready = true;
                }
            }
            Some(Item::Commit) => far.committed = true,
            Some(Item::RamEnd) => {}
            None if far.ended => far.dead = true,
            None => {}
        }
    }

    fn guest_starts(&mut self) {
        let equal = self.far.memory == self.source.memory;
        let (given, state) = (self.source.gave_away, self.far.state);
        self.must(equal && state, "started with other memory");
        self.must(given, "the guest was started before its source gave it away");
        (self.far.runs, self.far.ran) = (true, true);
        self.far.answers.push_back(true);
    }
}
