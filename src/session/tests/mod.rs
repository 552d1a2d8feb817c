//! A migration between two threads of one process over a socket pair.

#![allow(clippy::unwrap_used)]

mod control;
mod fingerprints;
mod greeting;
mod handed_in;
mod hooks;
mod hostile_postcopy;
mod mapped_file;
mod outage;
mod panics;
mod passed_ahead;
mod passing;
mod postcopy;
mod promptness;
pub(super) mod qemu_peer;
mod restore;
mod reuse;
mod streams;
mod vmm_configuration;

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::event::PollFlags;

use crate::engine::{Ending, Outcome, ThrottlePolicy};
pub(super) use crate::guest::TestMachine as Machine;
use crate::guest::{DeviceState, GuestControl, MappedGuest};
use crate::observe::EventKind;
use crate::ram::{BlockName, RamBlock};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::{FdKind, Mapping, RecvPart, SendPart, Stop, recv_parts, send_parts};
use crate::transport::{ByteSink, ByteSource, ChannelError, InlineLink};
use crate::units::{BlockIndex, BlockOffset, PageSize, Rate};

/// A socket as plain as it can be.
pub(super) struct Plain(UnixStream, u64);

impl Plain {
    fn wait(&self, what: PollFlags, stop: &Stop) -> Result<(), ChannelError> {
        match stop.wait(self.0.as_fd(), what).unwrap() {
            None => Ok(()),
            Some(reason) => Err(ChannelError::Stopped { reason, doing: "waiting" }),
        }
    }
}

impl crate::transport::Sealed for Plain {}

impl ByteSink for Plain {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let total: usize = parts.iter().map(SendPart::len).sum();
        let mut sent = 0;
        while sent < total {
            self.wait(PollFlags::OUT, stop)?;
            match send_parts(self.0.as_fd(), FdKind::Socket, parts, sent) {
                Ok(more) => sent += more,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(source) => {
                    return Err(ChannelError::Io { peer: "peer".into(), doing: "sending", source });
                }
            }
        }
        self.1 += total as u64;
        Ok(())
    }
    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }
    fn position(&self) -> u64 {
        self.1
    }
}

impl ByteSource for Plain {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        loop {
            // Bytes that are already here are taken even if no time is left: a poll has none.
            match recv_parts(self.0.as_fd(), into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::IN, stop)?,
                got => {
                    let (peer, doing) = ("peer".into(), "receiving");
                    return got.map_err(|source| ChannelError::Io { peer, doing, source });
                }
            }
        }
    }
    fn descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

pub(super) fn plain(socket: &UnixStream) -> Box<Plain> {
    socket.set_nonblocking(true).unwrap();
    Box::new(Plain(socket.try_clone().unwrap(), 0))
}

pub(super) fn guest(pages: &[u64]) -> Arc<MappedGuest> {
    let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
    for (index, pages) in pages.iter().enumerate() {
        let mapping = Mapping::anonymous(pages * 4096).unwrap();
        let name = BlockName::new(&format!("block{index}")).unwrap();
        builder = builder.mapping(RamBlock::new(name, pages * 4096), &mapping);
    }
    Arc::new(builder.build().unwrap())
}

pub(super) fn bytes(guest: &MappedGuest, block: u32) -> Vec<u8> {
    let region = guest.region(BlockIndex(block)).unwrap();
    let mut out = vec![0; region.len() as usize];
    region.span(0, region.len()).unwrap().copy_to(&mut out);
    out
}

pub(super) struct Ends {
    pub(super) source: SourceSession,
    pub(super) destination: DestinationSession,
    pub(super) source_machine: Machine,
    pub(super) destination_machine: Machine,
    pub(super) from: Arc<MappedGuest>,
    pub(super) to: Arc<MappedGuest>,
}

pub(super) fn ends() -> Ends {
    ends_with(|_| {})
}

pub(super) fn ends_with(set: impl FnOnce(&mut SourceSettings)) -> Ends {
    let (near, far) = UnixStream::pair().unwrap();
    let (from, to) = (guest(&[300, 7]), guest(&[300, 7]));
    for page in (0..300).filter(|page| page % 3 != 0) {
        let span = from.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap();
        span.copy_from(&[page as u8 | 1; 4096]);
    }
    let source_machine = Machine::running(b"devices");
    let destination_machine = Machine::default();
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.verify = Verify::Full;
    settings.guest_is_paused = true;
    set(&mut settings);
    let link = Box::new(InlineLink::new(plain(&near), from.clone()));
    let connection = SourceConnection::new(link, Some(plain(&near)));
    let control = Box::new(source_machine.clone());
    let source = SourceGuest { memory: from.clone(), dirty: Vec::new(), control };
    let destination = DestinationSession::new(
        DestinationGuest { memory: Box::new(to.clone()), control: Box::new(destination_machine.clone()) },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        DestinationSettings::default(),
    );
    let source = SourceSession::new(source, connection, settings);
    Ends { source, destination, source_machine, destination_machine, from, to }
}

#[test]
fn a_guest_moves_between_two_ramwires() {
    let ends = ends();
    let thread = std::thread::spawn(move || ends.destination.run());
    let sent = ends.source.run();
    let arrived = thread.join().unwrap();
    assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
    assert!(arrived.verified && arrived.native);
    for block in 0..2 {
        assert!(bytes(&ends.from, block) == bytes(&ends.to, block), "block {block} differs");
    }
    assert!(!ends.source_machine.runs() && ends.destination_machine.runs());
    assert_eq!(ends.destination_machine.state(), b"devices");
    let statistics = sent.statistics;
    assert_eq!((statistics.pages.normal, statistics.pages.zero), (200, 107));
    assert_eq!(arrived.pages, statistics.pages);
    assert_eq!(arrived.bytes, statistics.transferred);
    assert!(statistics.downtime > 0.0 && statistics.remaining == 0);
}

/// No source could report a write; nothing is sent and the guest is not touched.
#[test]
fn a_guest_that_may_write_needs_a_dirty_source() {
    let ends = ends_with(|settings| settings.guest_is_paused = false);
    let destination = ends.destination.spawn().unwrap();
    let sent = ends.source.run();
    let error = sent.error.as_ref().unwrap();
    assert!(sent.guest_is_safe_here() && ends.source_machine.runs());
    assert_eq!((error.kind(), sent.statistics.transferred), (ErrorKind::Config, 0));
    assert!(crate::error::Chain(error).to_string().contains("guest_is_paused"), "{error}");
    drop(sent);
    assert_eq!(destination.wait().unwrap().ending, Ending::Discarded);
}

/// No reader may see a good migration as one in doubt.
#[test]
fn a_good_migration_is_never_shown_in_doubt() {
    let ends = ends();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (list, figures) = (Arc::clone(&seen), ends.source.statistics());
    ends.source.statistics().listen(move |_| list.lock().unwrap().push(figures.snapshot().status));
    let destination = ends.destination.spawn().unwrap();
    assert_eq!(ends.source.run().outcome, Outcome::Completed);
    assert_eq!(destination.wait().unwrap().ending, Ending::Running);
    let seen = seen.lock().unwrap();
    use crate::observe::Status;
    assert!(seen.contains(&Status::HandingOver) && !seen.contains(&Status::InDoubt), "{seen:?}");
}

#[test]
fn handles_show_progress_and_give_both_reports() {
    let ends = ends();
    let destination = ends.destination.spawn().unwrap();
    let source = ends.source.spawn().unwrap();
    while !source.is_finished() {
        assert!(source.progress().transferred <= 2 << 20);
        std::thread::yield_now();
    }
    assert_eq!(source.progress().remaining, 0);
    assert_eq!(source.cancel(), CancelReply::TooLate);
    let happened: Vec<_> = source.events().iter().map(|event| event.kind).collect();
    let [
        EventKind::Setup,
        EventKind::Active,
        middle @ ..,
        EventKind::GivenAway,
        EventKind::Completed,
        EventKind::CleanedUp,
    ] = &happened[..]
    else {
        panic!("{happened:?}");
    };
    let rounds: Vec<_> = middle.iter().filter(|kind| matches!(kind, EventKind::Round(_))).collect();
    let syncs = middle.iter().filter(|kind| matches!(kind, EventKind::Synced { .. })).count();
    assert_eq!(rounds.len() + 1 + 2 * syncs, middle.len(), "one switchover among the rounds: {middle:?}");
    assert!(matches!(rounds[..], [EventKind::Round(first), ..] if first.dirty_pages == 307), "{rounds:?}");
    assert_eq!(source.wait().unwrap().outcome, Outcome::Completed);
    let happened: Vec<_> = destination.events().iter().map(|event| event.kind).collect();
    assert_eq!(happened, [EventKind::Setup, EventKind::Active, EventKind::Completed, EventKind::CleanedUp]);
    assert_eq!(destination.wait().unwrap().ending, Ending::Running);
    assert!(ends.destination_machine.runs());
}

/// At a byte a second the first whole page is followed by nothing for half an hour; a clone of the limit lets the guest go.
#[test]
fn a_limit_is_changed_while_it_holds() {
    let ends = ends();
    let control = ends.source.control();
    control.set_max_bandwidth(Rate::limit(1));
    let destination = ends.destination.spawn().unwrap();
    let source = ends.source.spawn().unwrap();
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while source.progress().pages.normal == 0 {
        assert!(std::time::Instant::now() < until, "{:?}", source.progress());
        std::thread::yield_now();
    }
    // Any time at all: within it a broken limit would let more pass.
    std::thread::sleep(std::time::Duration::from_millis(150));
    assert!(source.progress().pages.normal == 1 && !source.is_finished());
    control.set_max_bandwidth(None);
    assert_eq!(source.wait().unwrap().outcome, Outcome::Completed);
    assert_eq!(destination.wait().unwrap().ending, Ending::Running);
}

struct NotResumed;

impl crate::session::Upstream for NotResumed {
    fn wait(&mut self, _time: std::time::Duration) -> Result<crate::session::News, crate::session::Error> {
        Ok(crate::session::News::Stopped)
    }
    fn wait_for_ownership(
        &mut self,
        _: crate::engine::Handover,
        _time: std::time::Duration,
    ) -> Result<bool, crate::session::Error> {
        Ok(true)
    }
}

/// Throttling that would do nothing is refused before a byte is sent: a relay has no guest, and this machine counts no vCPU's
/// writes.
#[test]
fn throttling_that_can_not_work_are_refused() {
    for (means, relays) in [
        (ThrottlePolicy::auto_converge(), true),
        (ThrottlePolicy::dirty_limit(), true),
        (ThrottlePolicy::dirty_limit(), false),
    ] {
        let ends = ends();
        ends.source.control().set_throttling(Some(means)).unwrap();
        let source = if relays { ends.source.with_upstream(Box::new(NotResumed)) } else { ends.source };
        let sent = source.run();
        let text = sent.error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert!(text.contains(if relays { "ask that source" } else { "use auto-converge" }), "{text}");
        assert_eq!((sent.guest_is_safe_here(), sent.statistics.transferred), (true, 0));
    }
}

/// A machine that takes long to load its state.
struct SlowLoader(Machine, std::time::Duration);

impl GuestControl for SlowLoader {
    fn pause(&mut self) -> io::Result<()> {
        self.0.pause()
    }
    fn resume(&mut self) -> io::Result<()> {
        self.0.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for SlowLoader {
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        std::thread::sleep(self.1);
        self.0.load(from)
    }
}

/// A folder's `fsync` or a relay's far end may take hours: the source waits for a destination that reports that it is
/// busy.
#[test]
fn a_destination_at_work_is_waited_for_and_a_silent_one_is_not() {
    use std::time::Duration;
    let stall = Duration::from_secs(2);
    for says_so in [true, false] {
        let mut ends = ends_with(|settings| settings.stall_timeout = stall);
        ends.destination.keep_alive_every(if says_so { stall / 8 } else { Duration::MAX });
        ends.destination.control_by(Box::new(SlowLoader(ends.destination_machine.clone(), stall * 2)));
        let destination = ends.destination.spawn().unwrap();
        let sent = ends.source.run();
        let arrived = destination.wait().unwrap();
        let text = sent.error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert_eq!(sent.outcome == Outcome::Completed, says_so, "{text}");
        assert_eq!(arrived.ending == Ending::Running, says_so, "{:?}", arrived.error);
        assert_eq!(text.contains("within 2 s; raise the stall timeout"), !says_so, "{text}");
        assert_eq!(ends.source_machine.runs(), !says_so);
    }
}

/// At any moment: a source whose cancel returns Accepted has the guest, one whose cancel returns TooLate has handed it
/// over.
#[test]
fn the_answer_to_a_cancel_is_what_happens() {
    let mut answers = [0, 0];
    for moment in 0..60 {
        let ends = ends();
        let destination = ends.destination.spawn().unwrap();
        let source = ends.source.spawn().unwrap();
        let far = moment * 8;
        while !source.is_finished() && source.progress().transferred < far * 2048 {
            std::thread::yield_now();
        }
        let answer = source.cancel();
        answers[usize::from(answer == CancelReply::TooLate)] += 1;
        let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
        let stays = answer == CancelReply::Accepted;
        assert_eq!(sent.guest_is_safe_here(), stays, "{:?}", sent.error);
        assert_eq!(arrived.ending == Ending::Discarded, stays, "{:?}", arrived.error);
        assert_eq!((ends.source_machine.runs(), ends.destination_machine.runs()), (stays, !stays));
    }
    assert!(answers.iter().all(|count| *count > 0), "{answers:?}");
}

#[test]
fn a_dropped_handle_cancels_before_commit_only() {
    let before = ends();
    // READY was not sent yet, so the source can't have committed.
    drop(before.source.spawn().unwrap());
    assert_eq!(before.destination.spawn().unwrap().wait().unwrap().ending, Ending::Discarded);
    assert!(before.source_machine.runs());
    let after = ends();
    let destination = after.destination.spawn().unwrap();
    let source = after.source.spawn().unwrap();
    while source.progress().status != crate::observe::Status::Completed {
        std::thread::yield_now();
    }
    drop(source);
    assert_eq!(destination.wait().unwrap().ending, Ending::Running);
}

#[test]
fn a_thread_that_dies_or_never_starts_is_told() {
    struct Panics;
    impl GuestControl for Panics {
        fn pause(&mut self) -> io::Result<()> {
            panic!("a bug of the embedder's")
        }
        fn resume(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut ends = ends();
    ends.source.guest_mut().control = Box::new(Panics);
    ends.source.break_order(Breakage::DieOfPanic);
    let destination = ends.destination.spawn().unwrap();
    let source = ends.source.spawn().unwrap();
    assert!(source.events().iter().all(|event| !event.kind.is_last()), "and the channel of events ends");
    let error = source.wait().unwrap_err();
    assert!(crate::error::Chain(&error).to_string().contains("ramwire-source"), "{error}");
    assert_eq!(destination.wait().unwrap().ending, Ending::Discarded);
    let mut ends = self::ends();
    ends.source.settings_mut().spawner = Spawner::new(|_, _| Err(io::Error::other("no")));
    assert!(matches!(ends.source.spawn(), Err(Error::Thread { name: "ramwire-source", .. })));
    assert!(ends.source_machine.runs());
}

#[test]
fn a_cancel_before_commit_leaves_the_guest_at_the_source() {
    let ends = ends();
    ends.source.cancel_token().cancel();
    let thread = std::thread::spawn(move || ends.destination.run());
    let sent = ends.source.run();
    let arrived = thread.join().unwrap();
    assert!(sent.guest_is_safe_here() && ends.source_machine.runs());
    assert_eq!(sent.error.unwrap().kind(), ErrorKind::Cancelled);
    assert_eq!(sent.dirty.count(), 307);
    assert_eq!(arrived.ending, Ending::Discarded);
    assert!(matches!(arrived.error, Some(Error::Truncated { .. })), "{:?}", arrived.error);
    assert!(!ends.destination_machine.runs());
}
