//! Connections to the modelled destination that are lost, and those that follow.

use super::{Destination, Fault, Start};
use crate::transport::Address;

impl Destination {
    /// The connection is lost: a partly received host page is dropped, and a guest that had not started may be lost
    /// with it.
    pub(super) fn lose(&mut self) {
        self.cut = true;
        self.parts = Default::default();
        self.urgent.lose();
        self.replies.clear();
        self.input.clear();
        self.marks.clear();
        self.channels = Default::default();
        self.serves = None;
        (self.filled, self.known) = (0, None);
        self.told = !self.must_be_seen();
        // Or the loss is never noticed here. Refused before the switch.
        match &self.operator {
            _ if self.told => {}
            Some(operator) if !self.rng.one_in(3) => {
                self.told = operator.recover(Address::tcp("127.0.0.1", 1)).is_ok();
            }
            _ => self.may_be_reached = false,
        }
        self.lost_recovering += u64::from(self.recovering);
        match self.start {
            // A ramwire waits for another connection, though not for ever.
            Start::Loading(_) if self.native && !self.rng.one_in(8) => {}
            // A QEMU before 10.2 has committed itself by RUN, and starts the guest; a later one discards it.
            Start::Loading(_) if !self.native && self.rng.one_in(2) && self.fault != Fault::Load => {
                self.start = Start::Done;
                self.run();
            }
            Start::Loading(_) => (self.start, self.may_be_reached) = (Start::Failed, false),
            Start::NotYet => self.may_be_reached = false,
            // Its last message is lost as well. A ramwire sends it again on another connection.
            Start::Done if self.shut && !self.native => self.may_be_reached = false,
            // And so is the report that it has failed.
            Start::Failed => self.may_be_reached = false,
            Start::Done => {}
        }
    }

    /// The source opens another connection: its first byte shows its use. A silent one, while there is a main one, is
    /// for urgent pages.
    pub(super) fn connect(&mut self) -> bool {
        if self.cut && !self.told {
            self.violations.push("a connection comes before it has seen the loss".into());
        }
        if self.cut || !self.violations.is_empty() {
            return self.may_reconnect();
        }
        if self.sent_here == 0 {
            self.violations.push("a connection overtakes the main one".into());
        }
        self.urgent.connected |= self.urgent.wanted.is_some();
        true
    }

    /// A QEMU with a connection for urgent pages keeps listening, and ends on a connection that arrives before it has
    /// noticed the loss.
    pub(super) fn must_be_seen(&self) -> bool {
        !self.native && self.urgent.wanted.is_some()
    }

    pub(super) fn may_reconnect(&self) -> bool {
        let found = !self.violations.is_empty();
        let lives = match self.start {
            Start::Loading(_) => self.native && self.may_be_reached,
            Start::Done => self.native || !self.shut,
            Start::NotYet | Start::Failed => false,
        };
        matches!(self.fault, Fault::Cuts { .. }) && lives && !found
    }

    /// The source connects again.
    pub(super) fn reconnect(&mut self) -> bool {
        if !self.may_reconnect() {
            return false;
        }
        if !self.cut {
            // The source has closed it by itself.
            self.lose();
        }
        if let Fault::Cuts { next, times, .. } = &mut self.fault {
            *times = times.saturating_sub(1);
            self.breaks_at = (*times > 0).then_some(*next);
        }
        self.stream.restart();
        (self.cut, self.recovering, self.ended, self.asked, self.sent_here) = (false, true, false, None, 0);
        true
    }
}
