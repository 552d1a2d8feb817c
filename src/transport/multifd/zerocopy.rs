//! Guest pages that are lent to a byte stream: the kernel sends from the pages themselves, and reports when it no
//! longer uses them.
//!
//! The guest may write lent memory at any time; the bytes sent are then a mix of old and new, as with a copy. Such a
//! write marks the page dirty, so it is sent again, and those bytes are read even later: on the same channel they
//! follow in the stream, on another they wait after the barrier. A segment that TCP retransmits may differ, but only in
//! such a page. In the last round the guest does not write, and the round does not end before every page is returned.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::page_channel::Switch;
use crate::observe::ZeroCopyCounts;
use crate::sys::{FdKind, SendPart, Stop, ZeroCopyReceipt, send_parts, zero_copy_receipt};
use crate::transport::stream::stall_timer::StallTimer;
use crate::transport::stream::{End, SendBackend};
use crate::transport::{ChannelError, StreamChannel};

const TAKING_BACK: &str = "waiting until the kernel is done with lent pages";

/// Rest after a wait that brought nothing: the next call reports what ended it.
const RETRY_INTERVAL: Duration = Duration::from_millis(2);

const COPIES: &str =
    "the kernel copies the pages on this connection anyway, as it always does on the loopback";
const MAY_NOT_LOCK: &str = "the kernel may lock no memory for it: raise the limit on locked memory (ulimit -l) \
                            or net.core.optmem_max";

/// Counters of zero copy on all channels of a connection, and whether it is still tried.
#[derive(Debug)]
pub(super) struct ZeroCopyTally {
    sends: AtomicU64,
    released: AtomicU64,
    copied: AtomicU64,
    forbidden: AtomicU64,
    pub(super) switch: Switch,
}

impl Default for ZeroCopyTally {
    fn default() -> Self {
        let none = AtomicU64::default;
        Self {
            sends: none(),
            released: none(),
            copied: none(),
            forbidden: none(),
            switch: Switch::named("zero copy"),
        }
    }
}

impl ZeroCopyTally {
    pub(super) fn counts(&self) -> ZeroCopyCounts {
        ZeroCopyCounts {
            sends: self.sends.load(Ordering::Relaxed),
            released: self.released.load(Ordering::Relaxed),
            copied: self.copied.load(Ordering::Relaxed),
            forbidden: self.forbidden.load(Ordering::Relaxed),
            off: self.switch.why_off(),
        }
    }
}

/// Which sends the kernel has completed. It numbers them modulo 2^32 and reports them in ranges, mostly in order.
#[derive(Debug, Default)]
struct Ledger {
    sends: u64,
    /// All sends below are done.
    done: u64,
    /// Completed ranges beyond `done`.
    early: Vec<std::ops::Range<u64>>,
}

impl Ledger {
    fn sent(&mut self) {
        self.sends += 1;
    }

    /// True if the kernel still uses lent pages.
    fn is_out(&self) -> bool {
        self.done < self.sends
    }

    /// Processes a receipt; returns the number of sends that it completes. Numbers that are not outstanding are
    /// ignored.
    fn receipt(&mut self, receipt: ZeroCopyReceipt) -> u64 {
        let first = self.done + u64::from(receipt.first.wrapping_sub(self.done as u32));
        let end = first + u64::from(receipt.last.wrapping_sub(receipt.first)) + 1;
        let met = |early: &std::ops::Range<u64>| first < early.end && early.start < end;
        if end > self.sends || self.early.iter().any(met) {
            return 0;
        }
        self.early.push(first..end);
        while let Some(at) = self.early.iter().position(|early| early.start == self.done) {
            self.done = self.early.swap_remove(at).end;
        }
        end - first
    }
}

/// Zero-copy sending on one channel.
#[derive(Debug)]
pub(super) struct Lending {
    tally: Arc<ZeroCopyTally>,
    ledger: Ledger,
}

impl Lending {
    pub(super) fn new(tally: Arc<ZeroCopyTally>) -> Self {
        Self { tally, ledger: Ledger::default() }
    }

    pub(super) fn is_on(&self) -> bool {
        self.tally.switch.is_on()
    }

    /// Sends bytes by copy: receipts end each wait for room, and must be read.
    pub(super) fn send_copied(
        &mut self,
        channel: &mut StreamChannel,
        parts: &[SendPart<'_>],
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        channel.send_by(&mut Copied(self), parts, stop)
    }

    /// Sends guest pages, which the kernel may read until [`is_done`](Self::is_done) returns true for the returned
    /// mark.
    pub(super) fn lend(
        &mut self,
        channel: &mut StreamChannel,
        parts: &[SendPart<'_>],
        stop: &Stop,
    ) -> Result<u64, ChannelError> {
        channel.send_by(self, parts, stop)?;
        Ok(self.ledger.sends)
    }

    /// True if the kernel no longer uses any pages up to `mark`. Checks for receipts and does not wait.
    pub(super) fn is_done(&mut self, channel: &StreamChannel, mark: u64) -> Result<bool, ChannelError> {
        if self.ledger.done < mark {
            self.take_receipts(channel.end().0)?;
        }
        Ok(self.ledger.done >= mark)
    }

    /// Waits until some lent pages are returned, if there are any.
    pub(super) fn await_some(&mut self, channel: &StreamChannel, stop: &Stop) -> Result<(), ChannelError> {
        if !self.ledger.is_out() {
            return Ok(());
        }
        let (end, stall) = channel.end();
        let mut timer = StallTimer::new(end, TAKING_BACK, stall);
        while self.take_receipts(end)? == 0 {
            // poll(2) always reports the error queue, whatever events are requested.
            timer.wait(PollFlags::empty(), stop)?;
            if self.take_receipts(end)? > 0 {
                break;
            }
            if let Ok(Some(error)) = socket2::SockRef::from(&end.fd).take_error() {
                return Err(end.broken(TAKING_BACK, error));
            }
            timer.rest(RETRY_INTERVAL, stop)?;
        }
        Ok(())
    }

    /// Reads the available receipts; returns the number of sends that they complete.
    fn take_receipts(&mut self, end: &End) -> Result<u64, ChannelError> {
        let mut released = 0;
        while self.ledger.is_out() {
            let next = zero_copy_receipt(end.fd.as_fd()).map_err(|source| end.broken(TAKING_BACK, source))?;
            let Some(receipt) = next else { break };
            let sends = self.ledger.receipt(receipt);
            released += sends;
            self.tally.released.fetch_add(sends, Ordering::Relaxed);
            if receipt.copied && sends > 0 {
                self.tally.copied.fetch_add(sends, Ordering::Relaxed);
                self.tally.switch.turn_off(COPIES);
            }
        }
        Ok(released)
    }
}

impl SendBackend for Lending {
    fn send(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize> {
        if self.is_on() {
            match send_parts(end.fd.as_fd(), FdKind::ZeroCopy, parts, skip) {
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOBUFS) => {
                    self.tally.forbidden.fetch_add(1, Ordering::Relaxed);
                    // With nothing lent the result will not change later.
                    if !self.ledger.is_out() {
                        self.tally.switch.turn_off(MAY_NOT_LOCK);
                    }
                }
                Ok(count) => {
                    if count > 0 {
                        self.ledger.sent();
                        self.tally.sends.fetch_add(1, Ordering::Relaxed);
                    }
                    return Ok(count);
                }
                refused => return refused,
            }
        }
        send_parts(end.fd.as_fd(), end.kind(), parts, skip)
    }

    /// The error queue ends every wait immediately as long as it is not empty.
    fn before_wait(&mut self, end: &End) -> Result<(), ChannelError> {
        self.take_receipts(end).map(drop)
    }
}

/// Own bytes on a channel that borrows pages.
struct Copied<'a>(&'a mut Lending);

impl SendBackend for Copied<'_> {
    fn send(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize> {
        send_parts(end.fd.as_fd(), end.kind(), parts, skip)
    }

    fn before_wait(&mut self, end: &End) -> Result<(), ChannelError> {
        self.0.before_wait(end)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn receipt(first: u32, last: u32) -> ZeroCopyReceipt {
        ZeroCopyReceipt { first, last, copied: false }
    }

    #[test]
    fn only_what_all_before_it_is_done_counts_as_done() {
        let mut ledger = Ledger::default();
        (0..10).for_each(|_| ledger.sent());
        assert_eq!((ledger.receipt(receipt(3, 5)), ledger.done), (3, 0));
        assert_eq!((ledger.receipt(receipt(1, 2)), ledger.done), (2, 0));
        assert_eq!((ledger.receipt(receipt(0, 0)), ledger.done), (1, 6));
        assert!(ledger.is_out());
        assert_eq!((ledger.receipt(receipt(6, 9)), ledger.done), (4, 10));
        assert!(!ledger.is_out() && ledger.early.is_empty());
    }

    #[test]
    fn numbers_that_are_not_out_say_nothing() {
        let mut ledger = Ledger::default();
        (0..4).for_each(|_| ledger.sent());
        for (first, last) in [(0, 4), (4, 4), (2, 1), (u32::MAX, 0), (0, u32::MAX)] {
            assert_eq!((ledger.receipt(receipt(first, last)), ledger.done), (0, 0), "{first} {last}");
        }
        assert_eq!(ledger.receipt(receipt(2, 2)), 1);
        assert_eq!(ledger.receipt(receipt(1, 3)), 0, "one of them is known already");
        assert_eq!((ledger.receipt(receipt(0, 1)), ledger.done), (2, 3));
        assert_eq!(ledger.receipt(receipt(0, 1)), 0, "told twice");
    }

    #[test]
    fn the_count_goes_round() {
        let start = u64::from(u32::MAX) - 1;
        let mut ledger = Ledger { sends: start, done: start, early: Vec::new() };
        (0..4).for_each(|_| ledger.sent());
        assert_eq!((ledger.receipt(receipt(0, 1)), ledger.done), (2, start));
        assert_eq!((ledger.receipt(receipt(u32::MAX - 1, u32::MAX)), ledger.done), (2, start + 4));
    }
}
