//! How long a wait for the other end lasts.
//!
//! Three clocks run: the caller's [`Stop`], the stall time (no byte moved in either queue or call), and for TCP the
//! time without any answer from the peer's kernel. The last is checked here instead of by `TCP_USER_TIMEOUT`, which
//! also disconnects a peer that answers every probe but has no room (tcp(7)): a destination that reads slowly is alive.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::exec::ChildCommand;
use super::{End, StreamKind};
use crate::sys::{Stop, StopReason, TcpState, queued_bytes, tcp_state};
use crate::transport::ChannelError;

/// Longest time between two checks of the connection.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Longest wait for a socket's low-water mark: fewer bytes are read afterwards.
const SHORT_OF_MARK: Duration = Duration::from_millis(50);

/// One wait, starting with the last byte that moved.
pub(crate) struct StallTimer<'a> {
    end: &'a End,
    doing: &'static str,
    stall: Option<Duration>,
    moved_at: Instant,
    queued: Option<u64>,
    /// The last wait for a mark ended without it.
    short_of_mark: bool,
    /// Since when every check found bytes in flight and no answer.
    silent_since: Option<Instant>,
}

impl<'a> StallTimer<'a> {
    /// Starts the clocks. `stall` of `None` waits as long as the peer is alive.
    pub(crate) fn new(end: &'a End, doing: &'static str, stall: Option<Duration>) -> Self {
        let moved_at = Instant::now();
        Self { end, doing, stall, moved_at, queued: None, short_of_mark: false, silent_since: None }
    }

    /// Waits until the descriptor is ready. A wait to send also returns after a while if it is not: poll(2) reports a
    /// socket as writable only when a third of its buffer is free, but a send succeeds before that. So does a wait for
    /// only the error queue.
    pub(crate) fn wait(&mut self, what: PollFlags, stop: &Stop) -> Result<(), ChannelError> {
        let sending = !what.contains(PollFlags::IN);
        if sending && self.queued.is_none() {
            self.queued = self.queue();
        }
        loop {
            let slice = self.stall.map_or(POLL_INTERVAL, |stall| (stall / 4).min(POLL_INTERVAL));
            let ended = stop.within(slice).wait(self.end.fd.as_fd(), what);
            match ended.map_err(|source| self.end.broken(self.doing, source))? {
                None => return Ok(()),
                Some(StopReason::Cancelled) => return Err(self.stopped(StopReason::Cancelled)),
                Some(StopReason::Deadline) => {}
            }
            if let Some(reason) = stop.reason() {
                return Err(self.stopped(reason));
            }
            self.check_clocks(sending)?;
            if sending {
                return Ok(());
            }
        }
    }

    /// Waits until the socket's low-water mark is reached, or a while has passed: the bytes so far are then to be read.
    /// Only if there were none, the next wait checks the clocks.
    pub(crate) fn wait_for_mark(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        if self.short_of_mark {
            self.check_clocks(false)?;
        }
        let slice = self.stall.map_or(SHORT_OF_MARK, |stall| (stall / 4).min(SHORT_OF_MARK));
        let ended = stop.within(slice).wait(self.end.fd.as_fd(), PollFlags::IN);
        match ended.map_err(|source| self.end.broken(self.doing, source))? {
            Some(StopReason::Cancelled) => return Err(self.stopped(StopReason::Cancelled)),
            ended => self.short_of_mark = ended.is_some(),
        }
        Ok(())
    }

    /// Rests briefly in a wait that no event ends, and checks the clocks as `wait` does.
    pub(crate) fn rest(&mut self, time: Duration, stop: &Stop) -> Result<(), ChannelError> {
        match stop.sleep(time) {
            Some(reason) => Err(self.stopped(reason)),
            None => self.check_clocks(true),
        }
    }

    fn check_clocks(&mut self, sending: bool) -> Result<(), ChannelError> {
        let now = Instant::now();
        self.end.child.as_ref().map_or(Ok(()), ChildCommand::check)?;
        if sending {
            // Bytes that left the kernel's queue count as moved, even if there is no room for new ones yet.
            let queued = self.queue();
            if queued < self.queued {
                self.moved_at = now;
            }
            self.queued = queued;
        }
        let peer = || self.end.peer.clone();
        if self.end.stream_kind == StreamKind::Tcp && self.is_silent(now) {
            return Err(ChannelError::Silent {
                peer: peer(),
                doing: self.doing,
                after: self.end.dead_peer(),
            });
        }
        match self.stall {
            Some(after) if now.duration_since(self.moved_at) >= after => {
                Err(ChannelError::Stalled { peer: peer(), doing: self.doing, after })
            }
            _ => Ok(()),
        }
    }

    fn queue(&self) -> Option<u64> {
        queued_bytes(self.end.fd.as_fd(), self.end.kind()).ok()
    }

    fn is_silent(&mut self, now: Instant) -> bool {
        let Ok(state) = tcp_state(self.end.fd.as_fd()) else { return false };
        let since = *self.silent_since.get_or_insert(now);
        if !waits_for_an_answer(&state) || state.last_ack < now.duration_since(since) {
            self.silent_since = None;
            return false;
        }
        now.duration_since(since) >= self.end.dead_peer()
    }

    fn stopped(&self, reason: StopReason) -> ChannelError {
        ChannelError::Stopped { reason, doing: self.doing }
    }
}

/// True if the peer's kernel must answer: to retransmitted data, or to a probe of its closed window. Data beyond a
/// window that the peer has since closed needs no answer.
fn waits_for_an_answer(state: &TcpState) -> bool {
    let data = state.unacked > 0 && state.retransmits > 0 && state.send_window != Some(0);
    data || state.probes > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_with_a_closed_window_owes_an_answer_to_probes_only() {
        let calm = TcpState {
            unacked: 0,
            retransmits: 0,
            probes: 0,
            last_ack: Duration::from_secs(60),
            send_window: Some(1),
        };
        assert!(!waits_for_an_answer(&calm));
        assert!(!waits_for_an_answer(&TcpState { unacked: 9, ..calm }));
        let resent = TcpState { unacked: 9, retransmits: 1, ..calm };
        assert!(waits_for_an_answer(&resent));
        assert!(!waits_for_an_answer(&TcpState { send_window: Some(0), ..resent }));
        assert!(waits_for_an_answer(&TcpState { probes: 1, send_window: Some(0), ..calm }));
    }
}
