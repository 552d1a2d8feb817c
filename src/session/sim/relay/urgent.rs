//! Connections for urgent pages, from the source to the relay and from there to the far end.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::World;
use super::ends::{Item, ROOM};
use super::postcopy::bit;
use super::sides::{Near, Relay};
use crate::engine::{RelayAction, RelayEvent};
use crate::session::Breakage;

/// The source's end.
#[derive(Default)]
pub(super) struct SourceUrgent {
    wire: VecDeque<(usize, u32)>,
    /// It is cut.
    broken: bool,
    /// Another process than the relay keeps it open.
    pub(super) is_held: bool,
}

impl SourceUrgent {
    pub(super) fn has_room(&self) -> bool {
        self.wire.len() < ROOM
    }
}

/// The relay's part.
#[derive(Default)]
pub(super) struct RelayUrgent {
    /// The source's end of the connection, for the kernel.
    source: Option<UnixStream>,
    /// A page that is half written.
    writing: Option<(usize, u32)>,
    /// Pages that the far end waits for, and that are here.
    pub(super) asked: VecDeque<usize>,
}

impl Relay {
    /// Duplicates of the source's connection for urgent pages, if it has one.
    pub(super) fn urgent_descriptors(&mut self, there: bool) -> Vec<OwnedFd> {
        let pair = there.then(|| UnixStream::pair().unwrap());
        pair.into_iter()
            .map(|(source, ours)| {
                self.post.urgent.source = Some(source);
                ours.into()
            })
            .collect()
    }

    /// All that the source has discarded is here.
    pub(super) fn all_came(&self) -> bool {
        self.post.discards & !self.post.arrived == 0
    }
}

impl World {
    /// Its connection for urgent pages breaks, which the source notices when it writes there.
    pub(super) fn urgent_is_cut(&mut self) {
        self.saw("connection for urgent pages lost");
        self.source.post.urgent.broken = true;
        self.source.post.urgent.wire.clear();
    }

    pub(super) fn source_sends_urgent(&mut self, page: usize) {
        let value = self.source.memory[page];
        let urgent = &mut self.source.post.urgent;
        let to_guard = self.relay.is_none();
        if urgent.broken || to_guard && !urgent.is_held {
            let (ran, cut) = (self.source.runs, urgent.broken);
            self.source.is_cut();
            if cut {
                self.took_back(ran);
            }
            return;
        }
        urgent.wire.push_back((page, value));
        if to_guard {
            self.saw("an urgent page was sent to the guard");
        }
    }

    /// The thread of the relay that reads urgent pages.
    pub(super) fn urgent_steps(&mut self) {
        let Some(mut relay) = self.relay.take() else { return };
        if relay.post.switched && relay.near != Near::Ended {
            self.urgent_of(&mut relay);
        }
        self.relay = Some(relay);
    }

    fn urgent_of(&mut self, relay: &mut Relay) {
        let early = relay.breakage == Breakage::ReportUrgentEarly;
        if let Some((page, value)) = relay.post.urgent.writing.take() {
            relay.memory[page] = value;
            relay.post.arrived |= bit(page);
            if !early {
                relay.mark(page);
            }
            self.saw("urgent page placed");
            return;
        }
        match self.source.post.urgent.wire.pop_front() {
            Some((page, value)) => {
                relay.post.urgent.writing = Some((page, value));
                if early {
                    relay.mark(page);
                }
            }
            // Its loss ends what the other thread reads, and is none when all has come.
            None if self.source.post.urgent.broken
                && matches!(relay.near, Near::Reading | Near::AwaitsUrgent) =>
            {
                relay.near = Near::Settling;
            }
            None => {}
        }
    }

    /// The last page of the source's stream is here.
    pub(super) fn near_reads_end(&mut self, relay: &mut Relay) {
        relay.near = if relay.all_came() || !self.plan.preempt {
            Near::AwaitsEnd
        } else {
            self.saw("the end came before urgent pages");
            match relay.breakage {
                Breakage::EndBeforeUrgent => Near::Settling,
                _ => Near::AwaitsUrgent,
            }
        };
    }

    /// The side towards the source has failed: it says nothing before it is decided who has the guest.
    pub(super) fn near_settles(&mut self, relay: &mut Relay) {
        if self.source.is_gone() {
            relay.hub.post(RelayEvent::SourceGone);
        }
        if self.near_is_over(relay) {
            return;
        }
        if relay.has(RelayAction::TellRunning) {
            let silent = relay.breakage == Breakage::PartWhenMoved;
            self.near_ends(relay, (!silent).then_some(true));
        } else if relay.has(RelayAction::Unguard) {
            self.near_ends(relay, None);
        }
    }

    /// The relay sends a page that the far end waits for on the connection for those; false: there is none.
    pub(super) fn sends_urgent(&mut self, relay: &mut Relay) -> bool {
        let Some(page) = relay.post.urgent.asked.front().copied() else { return false };
        if self.far.post.urgent.len() < ROOM {
            self.saw("an urgent page left as such");
            relay.post.urgent.asked.pop_front();
            relay.left += 1;
            self.far.post.urgent.push_back(Item::Page(page, relay.memory[page]));
        }
        true
    }

    /// Pages that are under way to the far end on its connection for urgent ones.
    pub(super) fn urgent_under_way(&self) -> u64 {
        let pages = self.far.post.urgent.iter().map(|item| match item {
            Item::Page(page, _) => bit(*page),
            _ => 0,
        });
        pages.sum()
    }
}
