//! Zero ranges: sent one by one in QEMU's messages, or in lists if the destination supports them.
//!
//! Ranges gather until a credit is available, while writes of pages continue. The next list is sent when the
//! destination has processed the one before. So a fast network gets short lists immediately and a slow one gets long
//! lists, without a timer.

use std::collections::VecDeque;
use std::ops::Range;

use super::SourceHooks;
use crate::chunk::{Run, chunk_of};
use crate::control::{Compress, Message};
use crate::hooks::HooksError;
use crate::stop::Stop;

/// Maximum number of ranges in one list. Every write is compared with all of them.
const LIST_RANGES: usize = 256;
/// Maximum number of bytes in one list: the destination zeroes them in the thread that also answers requests.
const LIST_BYTES: u64 = 1 << 30;
/// If lists are supported, a single zero page between data still costs less if it is written.
const LIST_FLOOR_BYTES: u64 = 8 << 10;

/// A zero range that the destination has not processed yet.
#[derive(Debug)]
struct Zeroing {
    block: u32,
    range: Range<u64>,
    ticket: u64,
}

impl Zeroing {
    fn overlaps(&self, run: &Run) -> bool {
        self.block == run.block && self.range.start < run.range.end && run.range.start < self.range.end
    }
}

/// Zero ranges not yet processed, oldest first.
#[derive(Debug, Default)]
pub(super) struct Zeros {
    /// With the number of the message that carried them.
    told: VecDeque<(u64, Zeroing)>,
    gathered: VecDeque<Zeroing>,
    gathered_bytes: u64,
}

impl Zeros {
    /// Removes the ranges that the destination has processed.
    pub(super) fn settle(&mut self, is_finished: impl Fn(u64) -> bool) {
        while self.told.front().is_some_and(|(message, _)| is_finished(*message)) {
            self.told.pop_front();
        }
    }

    pub(super) fn oldest_ticket(&self) -> Option<u64> {
        self.told.front().map(|(_, zeroing)| zeroing.ticket).or_else(|| self.oldest_gathered())
    }

    pub(super) fn oldest_gathered(&self) -> Option<u64> {
        self.gathered.front().map(|zeroing| zeroing.ticket)
    }
}

impl SourceHooks {
    fn takes_lists(&self) -> bool {
        self.granted.extension.is_some_and(|extension| extension.features.zero_runs)
    }

    /// Minimum length in bytes of a zero run that is sent as a message although it could be written.
    pub(super) fn zero_floor(&self) -> u64 {
        let floor = self.config.zero_floor_bytes;
        if self.takes_lists() { floor.min(LIST_FLOOR_BYTES) } else { floor }
    }

    /// Sends a zero run to the destination, now or with the next list.
    pub(super) fn queue_zero_run(&mut self, run: Run, stop: &Stop) -> Result<(), HooksError> {
        self.wait_for_chunks(&run, stop)?;
        self.main.channel.counters.zero_ranges += 1;
        self.main.channel.counters.zero_bytes += run.len();
        self.zeros.gathered_bytes += run.len();
        let Run { block, range, ticket, .. } = run;
        self.zeros.gathered.push_back(Zeroing { block, range, ticket });
        let full = self.zeros.gathered.len() >= LIST_RANGES || self.zeros.gathered_bytes >= LIST_BYTES;
        if full { self.send_gathered(stop) } else { self.send_gathered_if_ready() }
    }

    /// Sends what needs no wait: a list if the destination has processed the one before, or one range.
    pub(super) fn send_gathered_if_ready(&mut self) -> Result<(), HooksError> {
        let may = !self.takes_lists() || self.zeros.told.is_empty();
        if may && !self.zeros.gathered.is_empty() && self.main.can_send_now() {
            return self.send_next_zeros(&Stop::default());
        }
        Ok(())
    }

    /// Sends all that has gathered.
    pub(super) fn send_gathered(&mut self, stop: &Stop) -> Result<(), HooksError> {
        while !self.zeros.gathered.is_empty() {
            self.send_next_zeros(stop)?;
        }
        Ok(())
    }

    /// Sends the next message: everything as a list, or the oldest range.
    fn send_next_zeros(&mut self, stop: &Stop) -> Result<(), HooksError> {
        let count = if self.takes_lists() { self.zeros.gathered.len() } else { 1 };
        let told = |zeroing: &Zeroing| Compress {
            block: zeroing.block,
            key: self.remote_label(zeroing.block) + zeroing.range.start,
            length: zeroing.range.end - zeroing.range.start,
        };
        let mut ranges: Vec<Compress> = self.zeros.gathered.iter().take(count).map(told).collect();
        let message = match (ranges.pop(), ranges.is_empty()) {
            (None, _) => return Ok(()),
            (Some(one), true) => Message::Compress(one),
            (Some(last), false) => {
                ranges.push(last);
                Message::ZeroRuns(ranges)
            }
        };
        // Until they are sent they stay where a write to them is held back.
        let number = self.main.send(&message, stop)?;
        for zeroing in self.zeros.gathered.drain(..count) {
            self.zeros.gathered_bytes -= zeroing.range.end - zeroing.range.start;
            self.zeros.told.push_back((number, zeroing));
        }
        Ok(())
    }

    /// The destination zeroes asynchronously: a write into the same range waits until it has.
    pub(super) fn wait_for_zeroing(&mut self, run: &Run, stop: &Stop) -> Result<(), HooksError> {
        if self.zeros.gathered.iter().any(|zeroing| zeroing.overlaps(run)) {
            self.send_gathered(stop)?;
        }
        let overlapping = self.zeros.told.iter().filter(|(_, zeroing)| zeroing.overlaps(run));
        let Some(number) = overlapping.map(|(number, _)| *number).max() else { return Ok(()) };
        self.main.wait_for(stop, |main| main.is_finished(number).then_some(()))?;
        self.settle();
        Ok(())
    }

    /// Writes on other queue pairs have no order relative to a message on the main one: before a range is zeroed,
    /// writes in flight to its chunks must complete.
    fn wait_for_chunks(&mut self, run: &Run, stop: &Stop) -> Result<(), HooksError> {
        if self.main.data_queues.is_empty() {
            return Ok(());
        }
        for chunk in chunk_of(run.range.start)..=chunk_of(run.range.end - 1) {
            let queue = self.queue_of(run.block, chunk);
            while queue > 0 && self.chunk_flights.contains_key(&(run.block, chunk)) {
                self.channel(queue).ring()?;
                if !self.pump()? {
                    self.rest(queue, stop)?;
                }
            }
        }
        Ok(())
    }
}
