//! The byte streams between the two ends, with at most one fault.

mod source;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use super::guest::PAGE;
use super::plan::{PeerKind, Side, Wire};
use super::world::{Mark, Sim, Turn, World, may_stall};
use crate::stream::native::{Answer, Order, Purpose};
use crate::stream::qemu::command::{Command, decode_command};
use crate::stream::qemu::return_path::Message;
use crate::sys::{RecvPart, SendPart, Stop, StopReason};
use crate::transport::{ByteSink, ByteSource, ChannelError};
pub(super) use source::SimSource;

/// Names every migration of the simulation.
pub(super) const MIGRATION_ID: [u8; 16] = [0x5a; 16];

const STALL: Duration = Duration::from_secs(30);

/// One direction.
#[derive(Debug)]
pub(super) struct Pipe {
    bytes: VecDeque<u8>,
    capacity: usize,
    /// Bytes taken from the sender, bytes given to the receiver.
    pub(super) sent: u64,
    pub(super) read: u64,
    /// Bytes that the receiver has processed: it requests more.
    pub(super) taken: u64,
    /// What happens at which byte.
    pub(super) fault: Option<(u64, Wire)>,
    /// The sender is gone, or seems so.
    pub(super) closed: bool,
    pub(super) reader_gone: bool,
    reset: bool,
    /// Bytes the sender still loses unknowingly; the connection is cut.
    grace: Option<u64>,
    /// No byte passes any more; sent bytes accumulate.
    stuck: Option<usize>,
    pub(super) may_stall: bool,
    /// Descriptors on their way, each with the position of its byte.
    descriptors: VecDeque<(u64, OwnedFd)>,
}

impl Pipe {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            bytes: VecDeque::new(),
            capacity,
            sent: 0,
            read: 0,
            taken: 0,
            fault: None,
            closed: false,
            reader_gone: false,
            reset: false,
            grace: None,
            stuck: None,
            may_stall: false,
            descriptors: VecDeque::new(),
        }
    }

    /// The host at the other end is gone.
    pub(super) fn hang_up(&mut self, reset: bool) {
        self.closed = true;
        self.reader_gone = true;
        self.reset |= reset;
    }

    fn room(&self) -> usize {
        self.capacity.saturating_sub(self.stuck.unwrap_or(self.bytes.len()))
    }

    fn is_broken(&self) -> bool {
        self.reset || self.reader_gone || self.grace == Some(0)
    }

    /// Takes bytes that have room.
    fn push(&mut self, bytes: &[u8]) {
        self.sent += bytes.len() as u64;
        match (&mut self.grace, &mut self.stuck) {
            (Some(grace), _) => *grace = grace.saturating_sub(bytes.len() as u64),
            (None, Some(stuck)) => *stuck += bytes.len(),
            (None, None) => self.bytes.extend(bytes),
        }
    }
}

impl World {
    /// Sends as much as there is room for, up to the byte at which a fault is due; returns how much was sent.
    fn send_some(&mut self, (generation, side): (usize, Side), bytes: &[u8]) -> usize {
        let pipe = self.pipe(generation, side);
        let mut take = bytes.len().min(pipe.room());
        if let Some((at, wire)) = pipe.fault {
            let before = at.saturating_sub(pipe.sent);
            if before < take as u64 {
                pipe.push(&bytes[..before as usize]);
                take = before as usize;
                pipe.fault = None;
                self.wire_fault(generation, side, wire);
                let Wire::Flip(bit) = wire else { return take };
                self.pipe(generation, side).push(&[bytes[take] ^ 1 << bit]);
                return take + 1;
            }
        }
        pipe.push(&bytes[..take]);
        take
    }

    fn wire_fault(&mut self, generation: usize, side: Side, wire: Wire) {
        let mark = match wire {
            Wire::Cut { .. } => Mark::Cut,
            Wire::Reset => Mark::Reset,
            Wire::Stall => Mark::Stalled,
            Wire::Flip(_) => Mark::Flipped,
        };
        self.mark(mark);
        self.pipe(generation, side).may_stall |= may_stall(wire);
        match wire {
            Wire::Cut { both, grace } => {
                for pipe in self.cut_pipes(generation, side, both) {
                    pipe.closed = true;
                    pipe.grace = Some(grace);
                }
            }
            Wire::Reset => self.reset(generation),
            Wire::Stall => self.pipe(generation, side).stuck = Some(0),
            Wire::Flip(_) => {}
        }
        self.progress();
    }

    fn cut_pipes(&mut self, generation: usize, side: Side, both: bool) -> impl Iterator<Item = &mut Pipe> {
        let cut = side as usize;
        self.pipes_of(generation)
            .iter_mut()
            .enumerate()
            .filter(move |(at, _)| both || *at == cut)
            .map(|(_, pipe)| pipe)
    }

    /// A reset discards the bytes that were not read.
    fn reset(&mut self, generation: usize) {
        for pipe in self.pipes_of(generation) {
            pipe.reset = true;
            pipe.bytes.clear();
        }
        // A network may let the page channels, or a NIC, live.
        if generation == 0 && !self.plan.losses.is_empty() && self.rng.one_in(2) {
            self.link.reset();
        }
    }

    /// Records the messages that decide about the guest, before the other end can have read them.
    fn overhear(&mut self, side: Side, parts: &[SendPart<'_>], position: u64) {
        let [SendPart::Own(bytes)] = parts else { return };
        self.overhear_resume(side, bytes, position);
        let before = self.commit;
        if side == Side::Target {
            let said = |message: Message<'_>| {
                let mut out = Vec::new();
                message.encode(&mut out);
                out == *bytes
            };
            self.ready |= said(Message::Native(Answer::Ready));
            self.refused |= said(Message::Shut { status: 1 });
            return;
        }
        let mut order = Vec::new();
        Command::Native(Order::Commit { migration_id: MIGRATION_ID }).encode(&mut order);
        if *bytes == order {
            if !self.ready {
                self.violation("COMMIT was said before READY");
            }
            self.commit = Some(position + bytes.len() as u64);
        }
        let end = self.guest.state_end;
        let is_qemu = self.plan.peer == PeerKind::Qemu;
        if self.commit.is_none() && end > 0 && *bytes == &self.guest.state[end..] {
            self.commit = Some(position + 1);
        } else if is_qemu && end > 0 && *bytes == &self.guest.state[..] {
            self.violation("the byte that commits left with the device state");
            self.commit = Some(position + end as u64 + 1);
        }
        if self.commit != before {
            self.commit_generation = self.generation();
        }
    }
}

impl World {
    /// RESUME says on which side the guest is to be.
    fn overhear_resume(&mut self, side: Side, bytes: &[u8], position: u64) {
        let decoded = decode_command(bytes).ok().filter(|_| side == Side::Source);
        let Some((Command::Native(Order::Resume(resume)), _)) = decoded else { return };
        match resume.purpose {
            Purpose::AskForGuest => {
                self.commit = Some(position + bytes.len() as u64);
                self.commit_generation = self.generation();
                self.mark(Mark::AskedBehindCommit);
            }
            Purpose::GoOn => self.ready = false,
            Purpose::GiveUp if self.commit.is_some() => self.violation("the source gives up behind COMMIT"),
            Purpose::GiveUp => {
                self.ready = false;
                self.mark(Mark::GaveUp);
            }
        }
    }
}

fn broken(doing: &'static str) -> ChannelError {
    let source = io::Error::from(io::ErrorKind::ConnectionReset);
    ChannelError::Io { peer: "sim".into(), doing, source }
}

fn no_answer(stop: &Stop, doing: &'static str) -> ChannelError {
    match stop.left() {
        Some(_) => ChannelError::Stopped { reason: StopReason::Deadline, doing },
        None => ChannelError::Stalled { peer: "sim".into(), doing, after: STALL },
    }
}

fn is_cancelled(stop: &Stop) -> bool {
    stop.reason() == Some(StopReason::Cancelled)
}

/// The sending end of a direction.
pub(super) struct SimSink {
    pub(super) sim: Sim,
    pub(super) side: Side,
    /// Of the connection: 0 for the first.
    pub(super) generation: usize,
}

impl SimSink {
    fn send_bytes<'t>(
        &self,
        mut turn: Turn<'t>,
        bytes: &[u8],
        stop: &Stop,
    ) -> Result<Turn<'t>, ChannelError> {
        const DOING: &str = "sending";
        let mut bytes = bytes;
        let way = (self.generation, self.side);
        while !bytes.is_empty() {
            let broken_now = turn.world.pipe(self.generation, self.side).is_broken();
            if broken_now || turn.world.is_endless() || (self.side == Side::Target && turn.world.killed) {
                return Err(broken(DOING));
            }
            if is_cancelled(stop) {
                return Err(ChannelError::Stopped { reason: StopReason::Cancelled, doing: DOING });
            }
            let sent = turn.world.send_some(way, bytes);
            if sent > 0 {
                turn.world.progress();
                turn.world.bytes_leave(sent as u64);
                bytes = &bytes[sent..];
                continue;
            }
            let ready = |world: &mut World| {
                let pipe = world.pipe(way.0, way.1);
                (pipe.room() > 0 || pipe.is_broken() || is_cancelled(stop)).then_some(())
            };
            let (back, answer) = turn.wait_for(ready);
            turn = back;
            if answer.is_none() {
                return Err(no_answer(stop, DOING));
            }
        }
        Ok(turn)
    }
}

impl crate::transport::Sealed for SimSink {}

impl ByteSink for SimSink {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let mut turn = self.sim.enter();
        if self.side == Side::Source && self.generation == 0 {
            turn.world.link_sees_bytes();
        }
        let position = turn.world.pipe(self.generation, self.side).sent;
        turn.world.overhear(self.side, parts, position);
        for part in parts {
            turn = match part {
                SendPart::Own(bytes) => self.send_bytes(turn, bytes, stop)?,
                SendPart::Guest(span) => {
                    let mut page = vec![0; span.len()];
                    let half = span.len() / 2;
                    span.copy_to(&mut page[..half]);
                    // The guest may write while the kernel is in the middle of its page.
                    turn.step();
                    span.part(half, span.len() - half).map(|rest| rest.copy_to(&mut page[half..]));
                    self.send_bytes(turn, &page, stop)?
                }
            };
        }
        turn.step();
        drop(turn.may_pass());
        Ok(())
    }

    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        drop(self.sim.enter());
        Ok(())
    }

    fn carries_descriptors(&self) -> bool {
        true
    }

    fn send_descriptor(
        &mut self,
        bytes: &[u8],
        descriptor: BorrowedFd<'_>,
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        let copy = descriptor.try_clone_to_owned().unwrap();
        let mut world = self.sim.world();
        let pipe = world.pipe(self.generation, self.side);
        pipe.descriptors.push_back((pipe.sent, copy));
        drop(world);
        self.send(&[SendPart::Own(bytes)], stop)
    }

    fn position(&self) -> u64 {
        let mut world = self.sim.world();
        let has_link = self.side == Side::Source && self.generation == 0;
        let pages = if has_link { world.link.pages_offered } else { 0 };
        world.pipe(self.generation, self.side).sent + pages * PAGE as u64
    }

    /// Where connections are lost, the destination waits until its last message was read.
    fn unacknowledged(&self) -> u64 {
        if self.side == Side::Source || self.sim.world().plan.losses.is_empty() {
            return 0;
        }
        let way = (self.generation, self.side);
        let unread = |world: &mut World| {
            let pipe = world.pipe(way.0, way.1);
            (pipe.read < pipe.sent, pipe.is_broken() || pipe.closed)
        };
        let ready = |world: &mut World| {
            let (unread, over) = unread(world);
            (!unread || over || world.killed || world.is_endless()).then_some(())
        };
        let (mut turn, _) = self.sim.enter().wait_for(ready);
        u64::from(unread(&mut turn.world).0)
    }
}

impl Drop for SimSink {
    fn drop(&mut self) {
        let mut world = self.sim.world();
        world.pipe(self.generation, self.side).closed = true;
        world.progress();
    }
}
