//! Messages over a verbs device.

use std::time::Instant;

use ramwire::transport::rdma_address;
use rdma_hooks::verbs::{Lane, LaneListener, LaneOp, LaneParams};
use rdma_hooks::{Cancel, FabricError, Stop};

use super::super::BenchError;
use super::measure::{Echo, Flow, silent};
use super::messages::{ANSWER_TIMEOUT, MessageStream, Op, Reply, Request};

/// How often memory or a completion queue is checked between two checks of the clock or the other end.
const POLLS: u32 = 1 << 16;
/// Number of receives posted at a time.
const RECEIVES: usize = 64;

fn rdma(error: FabricError) -> BenchError {
    BenchError::NoRdma(Box::new(error))
}

fn soon() -> Stop {
    Stop::new(Some(Instant::now() + ANSWER_TIMEOUT), Cancel::default())
}

/// The first half of a buffer is sent, the second is where the peer's bytes arrive.
fn params(request: &Request) -> LaneParams {
    LaneParams { bytes: 2 * request.size, depth: request.depth.max(16), receives: RECEIVES }
}

/// What both ends keep.
struct End {
    lane: Lane,
    size: usize,
    /// Requests without a completion yet.
    out: usize,
    max_outstanding: usize,
    /// Messages received and not yet processed.
    received: usize,
    /// Changes with every WRITE, to distinguish a new one from the last.
    mark: u8,
}

impl End {
    fn new(lane: Lane, request: &Request) -> Self {
        let max_outstanding = params(request).depth;
        Self { lane, size: request.size, out: 0, max_outstanding, received: 0, mark: 0 }
    }

    /// Processes completions; returns how many of them were our requests.
    fn poll(&mut self) -> Result<usize, BenchError> {
        let polled = self.lane.poll().map_err(rdma)?;
        self.out -= polled.requests.min(self.out);
        self.received += polled.received;
        Ok(polled.requests)
    }

    fn post(&mut self, op: LaneOp) -> Result<(), BenchError> {
        let there = if op == LaneOp::Write { self.size } else { 0 };
        let here = if op == LaneOp::Read { self.size } else { 0 };
        self.lane.post(op, here, there, self.size).map_err(rdma)?;
        self.out += 1;
        Ok(())
    }

    fn post_receive(&mut self) -> Result<(), BenchError> {
        self.lane.post_receive(self.size, self.size).map_err(rdma)
    }

    /// Sets the mark in the last byte and writes.
    fn write_marked(&mut self) -> Result<(), BenchError> {
        self.lane.set_byte(self.size - 1, self.mark);
        self.post(LaneOp::Write)
    }

    /// Polls until `arrived` returns true; calls `ended` occasionally. `false` if it had ended.
    fn poll_until(
        &mut self,
        mut arrived: impl FnMut(&mut Self) -> Result<bool, BenchError>,
        mut ended: impl FnMut() -> Result<bool, BenchError>,
    ) -> Result<bool, BenchError> {
        loop {
            for _ in 0..POLLS {
                if arrived(self)? {
                    return Ok(true);
                }
                std::hint::spin_loop();
            }
            if ended()? {
                return Ok(false);
            }
        }
    }

    fn mark_is_here(&mut self) -> Result<bool, BenchError> {
        Ok(self.lane.byte(2 * self.size - 1) == self.mark)
    }

    /// True if a message has arrived. Also processes our own completions.
    fn message_is_here(&mut self) -> Result<bool, BenchError> {
        self.poll()?;
        Ok(self.received > 0)
    }

    /// To be called after a post: processes completions, and waits for one if no more requests may be outstanding.
    fn make_room(&mut self) -> Result<(), BenchError> {
        self.poll()?;
        let begun = Instant::now();
        while self.out >= self.max_outstanding {
            self.poll()?;
            if begun.elapsed() > ANSWER_TIMEOUT {
                return Err(silent());
            }
        }
        Ok(())
    }
}

/// The asking end.
pub struct Verbs {
    end: End,
    op: Op,
}

impl Verbs {
    /// Connects to the address where the other end waits.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn connect(request: &Request, host: &str, port: u16) -> Result<Self, BenchError> {
        let lane = Lane::connect(host, port, &params(request), &soon()).map_err(rdma)?;
        let mut end = End::new(lane, request);
        if request.is_echo() && request.op == Op::Send {
            (0..RECEIVES).try_for_each(|_| end.post_receive())?;
        }
        Ok(Self { end, op: request.op })
    }
}

fn too_long(begun: Instant) -> impl FnMut() -> Result<bool, BenchError> {
    move || if begun.elapsed() > ANSWER_TIMEOUT { Err(silent()) } else { Ok(false) }
}

impl Echo for Verbs {
    fn exchange(&mut self) -> Result<(), BenchError> {
        let (end, begun) = (&mut self.end, Instant::now());
        if self.op == Op::Send {
            end.post(LaneOp::Send)?;
            end.poll_until(End::message_is_here, too_long(begun))?;
            end.received -= 1;
            end.post_receive()?;
        } else {
            end.mark = end.mark % 255 + 1;
            end.write_marked()?;
            end.poll_until(End::mark_is_here, too_long(begun))?;
        }
        end.make_room()
    }
}

impl Flow for Verbs {
    fn post(&mut self) -> Result<(), BenchError> {
        self.end.post(match self.op {
            Op::Write | Op::WriteComplete => LaneOp::Write,
            Op::Read => LaneOp::Read,
            Op::Send => LaneOp::Send,
        })
    }

    fn completed(&mut self) -> Result<usize, BenchError> {
        self.end.poll()
    }
}

/// The answering end: waits, connects, and answers until the other reports that it is done. `host` is an address of the
/// device; by default that of the first usable one.
///
/// # Errors
/// [`BenchError`].
pub fn answer(messages: &mut MessageStream, request: &Request, host: Option<&str>) -> Result<(), BenchError> {
    let bytes = params(request).bytes as u64;
    let host = match host {
        Some(host) => host.to_owned(),
        None => rdma_address(bytes).map_err(|why| BenchError::NoRdma(Box::new(why)))?.to_string(),
    };
    let mut listener = LaneListener::bind(&host, 0).map_err(rdma)?;
    messages.say(&Reply::At(host, listener.port()))?;
    let mut end = End::new(listener.accept(&params(request), &soon()).map_err(rdma)?, request);
    if request.op == Op::Send {
        (0..RECEIVES).try_for_each(|_| end.post_receive())?;
    }
    messages.say(&Reply::Ready)?;
    match (request.op, request.is_echo()) {
        (Op::Write, true) => loop {
            end.mark = end.mark % 255 + 1;
            if !end.poll_until(End::mark_is_here, || Ok(messages.has_more()))? {
                return Ok(());
            }
            end.write_marked()?;
            end.make_room()?;
        },
        (Op::Send, echo) => loop {
            if !end.poll_until(End::message_is_here, || Ok(messages.has_more()))? {
                return Ok(());
            }
            end.received -= 1;
            end.post_receive()?;
            if echo {
                end.post(LaneOp::Send)?;
                end.make_room()?;
            }
        },
        // The device answers by itself.
        _ => {
            messages.wait_for_more();
            Ok(())
        }
    }
}
