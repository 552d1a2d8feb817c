//! The far end behind a switch: its device state, its guest, and the loss of its connection.

use super::*;

impl World {
    pub(super) fn far_loads(&mut self) {
        let (now, far) = (self.now, &mut self.far);
        if far.post.present & bit(far.post.loads) == 0 {
            far.post.wait_for(far.post.loads, now);
        } else if far.thinks > 0 {
            far.thinks -= 1;
        } else if far.refuses {
            far.refuses();
        } else {
            let given = self.source.gave_away;
            self.must(given, "the guest was started before its source gave it away");
            let far = &mut self.far;
            (far.runs, far.ran, far.post.taken, far.post.took) = (true, true, true, true);
            far.post.waits = None;
        }
    }

    pub(super) fn far_guest_steps(&mut self) {
        if let Some(page) = self.far.post.touches.front().copied() {
            if self.far.post.present & bit(page) == 0 {
                self.far.post.wait_for(page, self.now);
            } else {
                let same = self.far.memory[page] == self.source.memory[page];
                self.must(same, "the guest saw a page that is older");
                self.far.post.touches.pop_front();
                self.far.post.waits = None;
            }
        }
        if let Some((_, since)) = self.far.post.waits
            && self.plan.fault.is_none()
        {
            let short = self.now - since < PATIENCE;
            self.must(short, "a thread waits for a page that nobody was asked for");
        }
        if self.far.post.ended && self.far.post.present == ALL && !self.far.post.complete {
            self.far.post.complete = true;
            self.far.answers.push_back(true);
        }
    }

    /// The far end's connection breaks. In precopy, and before it was given the guest, it ends.
    pub(in crate::session::sim::relay) fn far_is_cut(&mut self) {
        self.saw("far end cut off");
        if !self.far.committed {
            return self.far.dies();
        }
        if self.far.runs {
            self.saw("connection lost in postcopy");
        }
        (self.far.ended, self.far.post.cut) = (true, true);
        self.far.wire.clear();
        self.far.post.urgent.clear();
        self.far.answers_close();
    }
}
