//! The receiving end.

use super::*;

/// The receiving end of what `from` sends.
pub(in crate::session::sim) struct SimSource {
    pub(in crate::session::sim) sim: Sim,
    pub(in crate::session::sim) from: Side,
    pub(in crate::session::sim) generation: usize,
}

impl crate::transport::Sealed for SimSource {}

impl ByteSource for SimSource {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        const DOING: &str = "receiving";
        let mut turn = self.sim.enter();
        let pipe = turn.world.pipe(self.generation, self.from);
        pipe.taken = pipe.read;
        let poll = stop.left() == Some(Duration::ZERO);
        let (generation, from) = (self.generation, self.from);
        let ready = |world: &mut World| {
            let dead = from == Side::Source && world.killed || world.is_endless();
            let pipe = world.pipe(generation, from);
            match () {
                () if pipe.reset || dead => Some(Err(broken(DOING))),
                () if is_cancelled(stop) => {
                    Some(Err(ChannelError::Stopped { reason: StopReason::Cancelled, doing: DOING }))
                }
                () if !pipe.bytes.is_empty() => Some(Ok(pipe.bytes.len())),
                () if pipe.closed => Some(Ok(0)),
                () if poll => Some(Err(ChannelError::Stopped { reason: StopReason::Deadline, doing: DOING })),
                () => None,
            }
        };
        let (mut turn, answer) = turn.wait_for(ready);
        let there = answer.unwrap_or_else(|| Err(no_answer(stop, DOING)))?;
        let piece = turn.world.plan.piece;
        let most = 1 + turn.world.rng.below(piece) as usize;
        let mut got = 0;
        for part in into {
            let count = part_len(part).min(there.min(most) - got);
            let pipe = turn.world.pipe(generation, from);
            let bytes = &pipe.bytes.make_contiguous()[..count];
            match part {
                RecvPart::Own(room) => room[..count].copy_from_slice(bytes),
                RecvPart::Guest(span) => drop(span.copy_from(bytes)),
            }
            pipe.bytes.drain(..count);
            pipe.read += count as u64;
            got += count;
        }
        turn.world.commit_may_be_read(generation, from);
        turn.world.progress();
        Ok(got)
    }

    fn want_descriptors(&mut self, wanted: bool) -> bool {
        wanted
    }

    fn next_descriptor(&mut self) -> Option<OwnedFd> {
        let mut world = self.sim.world();
        let pipe = world.pipe(self.generation, self.from);
        let (at, _) = pipe.descriptors.front()?;
        if *at >= pipe.read {
            return None;
        }
        pipe.descriptors.pop_front().map(|(_, descriptor)| descriptor)
    }
}

fn part_len(part: &RecvPart<'_>) -> usize {
    match part {
        RecvPart::Own(room) => room.len(),
        RecvPart::Guest(span) => span.len(),
    }
}

impl Drop for SimSource {
    fn drop(&mut self) {
        let mut world = self.sim.world();
        let pipe = world.pipe(self.generation, self.from);
        pipe.reader_gone = true;
        let unread = !pipe.bytes.is_empty();
        // A socket closed with unread bytes answers with a reset, which may overtake our last messages.
        let faulty = world.plan.fault.is_some() || !world.plan.losses.is_empty();
        if unread && faulty && world.rng.one_in(2) {
            world.mark(Mark::Rude);
            world.reset(self.generation);
        }
        world.progress();
    }
}
