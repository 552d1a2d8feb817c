//! Messages of the destination that the source takes, and the source's waits while it has no action.

use std::time::Duration;

use crate::engine::{AnswerTimeouts, Handover, Overdue, SourceEvent, Waiting};
use crate::error::{Chain, Remedy};
use crate::observe::Status;
use crate::ram::RamBlockTable;
use crate::stream::qemu::package::PING_TAKEN;
use crate::sys::{Stop, StopReason};

use super::postcopy::PING_PACKAGED;
use super::return_path::PeerMessage;
use super::{News, SourceSession};
use crate::session::callback::named;
use crate::session::config::SourceSettings;
use crate::session::{Breakage, Error};

/// Longest time in which a source with nothing to send is silent.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// Interval between two checks of the peer while waiting for another party: the embedder, a relay's source.
const PEER_CHECK_INTERVAL: Duration = Duration::from_millis(5);

/// Between two looks whether a late answer is of any use still.
const LATE_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Minimum number of bytes of RAM a second that a destination compares and stores: bounds the wait for one that goes on
/// reporting that it is busy.
const SLOWEST_LOAD: u64 = 64 << 20;

/// Maximum number of messages taken in one poll of the return path.
const MAX_MESSAGES: usize = 64;

/// Maximum number of requests that wait here. Further ones wait in the connection.
const MAX_REQUESTS: usize = 1024;

/// How long the answers of the destination are waited for.
pub(super) fn answer_timeouts(settings: &SourceSettings, table: &RamBlockTable) -> AnswerTimeouts {
    let running = settings.finish_timeout;
    // Before READY it makes its own digest, and may write RAM to a disk: the wait lasts while it reports that it is
    // busy, except for a cancel.
    let work = Duration::from_secs(table.travelling() / SLOWEST_LOAD);
    AnswerTimeouts { ready: running.saturating_add(work), silence: settings.stall_timeout, running }
}

impl SourceSession {
    /// There is no action: waits for the next event.
    pub(super) fn wait_for_event(&mut self) -> Result<SourceEvent, Error> {
        let Some(waiting) = self.driver.engine.waits_for() else { return Ok(SourceEvent::Failed) };
        tracing::trace!(?waiting, "wait");
        self.figures.waits(self.driver.clock.now(), waiting);
        match waiting {
            Waiting::Moment => self.wait_moment(),
            Waiting::Embedder => self.wait_for_embedder(),
            Waiting::Guest => self.wait_for_guest(),
            Waiting::Ready if self.breakage.is(Breakage::CommitBeforeReady) => Ok(SourceEvent::Ready),
            Waiting::Running if self.breakage.is(Breakage::CompleteAtCommit) => Ok(SourceEvent::Running),
            Waiting::LateAnswer => self.wait_for_late_answer(),
            _ => self.wait_for_peer(),
        }
    }

    /// Time during which the engine needs no call.
    pub(super) fn time_left(&mut self) -> Option<Duration> {
        let now = self.driver.clock.now();
        self.driver.engine.wake_at().map(|at| at.saturating_sub(now))
    }

    /// For bytes in flight to leave, or for a relay's source to stop its guest.
    fn wait_moment(&mut self) -> Result<SourceEvent, Error> {
        let mut left = self.time_left().unwrap_or_default();
        self.send_keepalive()?;
        if self.upstream.is_none() {
            self.listen_for(left)?;
            return Ok(SourceEvent::Woken);
        }
        loop {
            self.poll_return_path()?;
            let piece = left.min(PEER_CHECK_INTERVAL);
            left -= piece;
            let Some(upstream) = &mut self.upstream else { return Ok(SourceEvent::Woken) };
            match named("calling Upstream::wait", || upstream.wait(piece))? {
                News::None => {}
                News::Stopped => return Ok(SourceEvent::UpstreamStopped),
                News::Switched(behind) => {
                    self.missing.behind = Some(behind);
                    return Ok(SourceEvent::StartPostcopy);
                }
            }
            if left.is_zero() || self.wire.stop.reason().is_some() {
                return Ok(SourceEvent::Woken);
            }
        }
    }

    /// For the embedder, before the last sync; a cancel or a peer that fails ends it.
    fn wait_for_embedder(&mut self) -> Result<SourceEvent, Error> {
        while !self.driver.control.gate().wait(PEER_CHECK_INTERVAL) {
            self.poll_return_path()?;
            self.send_keepalive()?;
            if self.wire.stop.reason().is_some() {
                return Err(Error::Cancelled);
            }
        }
        Ok(SourceEvent::Continue)
    }

    /// For a relay's source: before COMMIT, so that a failure on either side leaves the guest at its source.
    fn wait_for_guest(&mut self) -> Result<SourceEvent, Error> {
        let handover = self.driver.engine.handover();
        while let Some(upstream) = &mut self.upstream
            && !named("calling Upstream::wait_for_ownership", || {
                upstream.wait_for_ownership(handover, PEER_CHECK_INTERVAL)
            })?
        {
            self.poll_return_path()?;
            if self.wire.stop.reason().is_some() {
                return Err(Error::Cancelled);
            }
        }
        Ok(SourceEvent::GuestGiven)
    }

    /// For an answer.
    fn wait_for_peer(&mut self) -> Result<SourceEvent, Error> {
        if self.time_left() == Some(Duration::ZERO) {
            // What has come by now has come in time.
            self.poll_return_path()?;
        }
        let stop = match self.time_left() {
            // A peer that sends without a pause never makes a wait end, so check the time here.
            Some(Duration::ZERO) => return Ok(SourceEvent::Woken),
            Some(left) => self.wire.stop.within(left),
            None => self.wire.stop.clone(),
        };
        self.next_event(&stop).map(|event| event.unwrap_or(SourceEvent::Woken))
    }

    /// In doubt a relay continues to wait: its far end may only have been stalled.
    fn wait_for_late_answer(&mut self) -> Result<SourceEvent, Error> {
        while let Some(upstream) = &mut self.upstream
            && upstream.still_listens()
        {
            if let Some(event) = self.next_event(&Stop::never().within(LATE_CHECK_INTERVAL))? {
                return Ok(event);
            }
        }
        Ok(SourceEvent::Failed)
    }

    /// A relay is in doubt.
    pub(super) fn report_silence(&mut self) -> Result<SourceEvent, Error> {
        let silence = self.driver.engine.overdue().map(no_answer);
        if let (Some(upstream), Some(silence)) = (&mut self.upstream, silence) {
            self.figures.shared().update(|s| s.status = Status::InDoubt);
            upstream.far_end_is_silent(&silence);
        }
        Ok(SourceEvent::Done)
    }

    /// Why the engine ended the migration, if it was because of a timeout.
    pub(super) fn note_overdue(&mut self) {
        if let (Some(overdue), None) = (self.driver.engine.overdue(), &self.error) {
            let error = no_answer(overdue);
            tracing::warn!(error = %Chain(&error), "the migration takes too long");
            self.error = Some(error);
        }
    }

    /// A source with nothing to send sends a keepalive.
    fn send_keepalive(&mut self) -> Result<(), Error> {
        let every = (self.settings.stall_timeout / 4).min(KEEPALIVE_INTERVAL);
        Ok(self.wire.send_keepalive(self.driver.clock.now(), every)?)
    }

    /// Takes the messages that the peer has sent meanwhile. Never waits.
    pub(super) fn poll_return_path(&mut self) -> Result<(), Error> {
        // The rest is taken at the next poll: a peer that floods us with messages must not keep us from sending pages.
        for _ in 0..MAX_MESSAGES {
            let Some(back) = self.wire.back.as_mut().filter(|_| self.pages.search.asked() < MAX_REQUESTS)
            else {
                break;
            };
            let Some(message) = back.poll()? else { break };
            self.take_message(message)?;
        }
        Ok(())
    }

    /// Takes the peer's messages for `time`; less if one of them is for the engine.
    pub(super) fn listen_for(&mut self, time: Duration) -> Result<(), Error> {
        let stop = self.wire.stop.within(time);
        if self.wire.back.is_none() {
            stop.sleep(time);
            return Ok(());
        }
        if let Some(event) = self.next_event(&stop)? {
            let now = self.driver.clock.now();
            self.driver.engine.handle(now, event);
        }
        Ok(())
    }

    /// Waits for a message that is an event; `None` at the deadline of `stop`. Other messages of the peer do not extend
    /// the wait.
    fn next_event(&mut self, stop: &Stop) -> Result<Option<SourceEvent>, Error> {
        loop {
            let Some(back) = &mut self.wire.back else {
                return Err(Error::PeerFailed { why: "there is no return path for its answer".into() });
            };
            let message = match back.next(stop) {
                Ok(message) => message,
                Err(error) if error.is_deadline() => return Ok(None),
                Err(error) => return Err(error),
            };
            if let Some(event) = self.event_of(message)? {
                return Ok(Some(event));
            }
            match stop.reason() {
                // A peer that sends without a pause never makes next() wait, so check the deadline here.
                Some(StopReason::Deadline) => return Ok(None),
                Some(StopReason::Cancelled) => return Err(Error::Cancelled),
                None => {}
            }
        }
    }

    pub(super) fn take_message(&mut self, message: PeerMessage) -> Result<(), Error> {
        if let Some(event) = self.event_of(message)? {
            let now = self.driver.clock.now();
            self.driver.engine.handle(now, event);
        }
        Ok(())
    }

    /// The event of a message for the engine; `None` if it is no event.
    ///
    /// # Errors
    /// The peer failed, or it is not its turn to send this.
    fn event_of(&mut self, message: PeerMessage) -> Result<Option<SourceEvent>, Error> {
        let handover = self.driver.engine.handover();
        if let PeerMessage::Pong(value) = message {
            self.missing.background.answered(self.driver.clock.now(), value);
            if value == PING_PACKAGED && self.driver.engine.is_postcopy() {
                self.missing.background.serves();
            }
            self.pages.prints.answered(value);
            if let Some(release) = &mut self.missing.release {
                release.answered(value);
            }
        }
        if let PeerMessage::Fenced(number) = message {
            return self.fence_confirmed(number).map(|()| None);
        }
        if let PeerMessage::ReadWhole(number) = message {
            return self.span_is_there(number).map(|()| None);
        }
        let event = match &message {
            PeerMessage::Working => SourceEvent::Working,
            PeerMessage::Ready => SourceEvent::Ready,
            PeerMessage::Running if handover == Handover::Native => SourceEvent::Running,
            PeerMessage::Shut(0) if handover == Handover::Shut => SourceEvent::Running,
            PeerMessage::Request(_) => SourceEvent::Requested,
            PeerMessage::Pong(PING_TAKEN) if self.driver.engine.is_postcopy() => SourceEvent::Taken,
            _ => return refuse_verdict(message).map(|()| None),
        };
        if !self.driver.engine.expects(event) {
            return refuse_verdict(message).map(|()| None);
        }
        match &message {
            PeerMessage::Request(request) => self.requested(request)?,
            PeerMessage::Pong(_) if !self.driver.engine.is_taken() => {
                self.figures.taken(self.driver.clock.now());
                self.missing.behind.iter_mut().for_each(|behind| behind.taken());
            }
            _ => {}
        }
        Ok(Some(event))
    }

    /// What the peer reported last, before the connection broke: that the guest runs, or why it failed. Its other messages no
    /// longer matter.
    pub(super) fn last_word(&mut self) -> Option<LastWord> {
        for _ in 0..MAX_MESSAGES {
            let message = self.wire.back.as_mut()?.poll().ok()??;
            if message == PeerMessage::Running && self.driver.engine.expects(SourceEvent::Running) {
                return Some(LastWord::Running);
            }
            if let PeerMessage::Fenced(number) = message {
                // What it had in place by then counts behind the loss, too.
                let _ = self.fence_confirmed(number);
                continue;
            }
            if let Err(error @ Error::PeerFailed { .. }) = refuse_verdict(message) {
                return Some(LastWord::Failed(error));
            }
        }
        None
    }
}

/// What a peer has reported on a connection that is broken.
pub(super) enum LastWord {
    /// The guest runs there.
    Running,
    /// It failed.
    Failed(Error),
}

/// What did not come in time, as an error.
fn no_answer(overdue: Overdue) -> Error {
    let of = |what, after, remedy| Error::NoAnswer { what, after, remedy };
    match overdue {
        Overdue::Switchover(after) => Error::NotConverged { after },
        Overdue::Ready(after) => of("that it has loaded the guest", after, Remedy::RaiseFinishTimeout),
        Overdue::Keepalive(after) => of("that it has loaded the guest", after, Remedy::RaiseStallTimeout),
        Overdue::Taken(after) => of("that it takes the guest", after, Remedy::RaiseFinishTimeout),
        Overdue::Running(after) => of("that the guest runs", after, Remedy::RaiseFinishTimeout),
    }
}

/// Returns a message that reports the peer's failure, or that is out of turn, as an error; harmless ones pass.
pub(super) fn refuse_verdict(word: PeerMessage) -> Result<(), Error> {
    match word {
        PeerMessage::Pong(_) | PeerMessage::SwitchoverAck => Ok(()),
        PeerMessage::Refused(why) => Err(Error::PeerFailed { why }),
        PeerMessage::Shut(status) if status != 0 => {
            Err(Error::PeerFailed { why: format!("it ended the migration with status {status}") })
        }
        word => Err(Error::OutOfTurn { what: format!("{word:?}"), at: None, while_doing: "sending RAM" }),
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::engine::{Sent, SourceAction};
    use crate::session::source::{Clock, SourceConnection, SourceGuest};
    use crate::session::tests::{Machine, guest, plain};
    use crate::stream::native::Answer;
    use crate::stream::qemu::file::Configuration;
    use crate::stream::qemu::return_path::Message;
    use crate::transport::{ChannelError, InlineLink};

    /// No time of the engine's is left.
    struct Late;

    impl Clock for Late {
        fn now(&self) -> Duration {
            Duration::from_secs(1 << 20)
        }
    }

    /// A source that sends RAM to a ramwire, and the far end of its connection.
    pub(in crate::session::source) fn sending() -> (SourceSession, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let memory = guest(&[1]);
        let link = Box::new(InlineLink::new(plain(&near), memory.clone()));
        let machine = Box::new(Machine::running(b"devices"));
        let settings = SourceSettings::new(Configuration::default());
        let source = SourceGuest { memory, dirty: Vec::new(), control: machine };
        let mut session =
            SourceSession::new(source, SourceConnection::new(link, Some(plain(&near))), settings);
        session.driver.engine.set_resumable(true);
        let set_up = SourceEvent::SetUp { handover: Handover::Native };
        for event in [SourceEvent::Begin, SourceEvent::Done, SourceEvent::Done, set_up] {
            answer(&mut session, event);
        }
        (session, far)
    }

    fn answer(session: &mut SourceSession, event: SourceEvent) -> Option<SourceAction> {
        session.driver.engine.handle(Duration::ZERO, event);
        session.driver.engine.poll()
    }

    /// One that has sent COMMIT.
    fn committed() -> (SourceSession, UnixStream) {
        let (mut session, far) = sending();
        let synced = SourceEvent::Synced { dirty_pages: 0 };
        let sent = SourceEvent::Sent { pages_left: 0, sent: Sent::default() };
        let done = SourceEvent::Done;
        let live = [synced, done, sent, done];
        let paused = [synced, done, synced, done, sent, done, done, done];
        for event in live.into_iter().chain(paused) {
            answer(&mut session, event);
        }
        assert_eq!(answer(&mut session, SourceEvent::Ready), Some(SourceAction::Commit));
        assert_eq!(answer(&mut session, done), None);
        assert_eq!(session.driver.engine.waits_for(), Some(Waiting::Running));
        (session, far)
    }

    fn say(far: &mut UnixStream, answers: Answer<'_>) {
        let mut out = Vec::new();
        Message::Native(answers).encode(&mut out);
        far.write_all(&out).unwrap();
    }

    #[test]
    fn a_running_that_has_come_counts_although_the_time_is_over() {
        let (mut session, mut far) = committed();
        session.count_time_by(Box::new(Late));
        say(&mut far, Answer::Running);
        let event = session.wait_for_event().unwrap();
        session.driver.engine.handle(Late.now(), event);
        assert_eq!(session.driver.engine.poll(), Some(SourceAction::Release));

        let (mut session, _far) = committed();
        session.count_time_by(Box::new(Late));
        let event = session.wait_for_event().unwrap();
        session.driver.engine.handle(Late.now(), event);
        assert_eq!(session.driver.engine.poll(), Some(SourceAction::Reconnect), "nothing has come");
    }

    #[test]
    fn a_running_that_has_come_counts_although_the_connection_is_lost() {
        let (mut session, mut far) = committed();
        say(&mut far, Answer::Working);
        say(&mut far, Answer::Running);
        let closed = || ChannelError::Closed { peer: "far".into(), doing: "sending" }.into();
        assert_eq!(session.keep(closed()), SourceEvent::Running);
        assert_eq!(session.keep(closed()), SourceEvent::Lost);
    }

    /// The guest runs on after a loss: what was allowed for its last pause is not allowed for the next.
    #[test]
    fn a_switchover_is_allowed_for_one_pause() {
        let (mut session, _far) = sending();
        session.control().continue_switchover();
        assert!(session.driver.control.gate().wait(Duration::ZERO));
        session.let_guest_run().unwrap();
        assert!(!session.driver.control.gate().wait(Duration::ZERO));
        session.control().continue_switchover();
        assert!(session.driver.control.gate().wait(Duration::ZERO));
    }
}
