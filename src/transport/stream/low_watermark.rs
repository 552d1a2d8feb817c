//! Waits that end when many bytes have arrived, instead of with the first segment.
//!
//! A receiver that is faster than its sender sleeps, and is woken for each segment. On a fast link this costs both ends
//! time, most over the loopback, where the sender does the waking. So if it is known how many bytes must come, the
//! kernel wakes the receiver for that number (SO_RCVLOWAT). While data arrives fast, it waits up to 500 us so that one
//! read takes more. TCP only: a UNIX socket accepts the mark but ignores it, and a vsock socket has no room beyond it.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::StreamKind;
use crate::sys::set_low_water;

/// Minimum number of bytes to wait for: fewer come in one or two segments anyway.
const FEWEST: usize = 32 << 10;

/// Numbers of bytes to wait for if they need not come, chosen by the data rate.
const MARKS: [usize; 4] = [1 << 20, 512 << 10, 256 << 10, 128 << 10];

/// Maximum number of bytes to wait for. The kernel's own limit is half of the receive buffer's maximum, 3 MiB by
/// default.
const MAX_MARK: usize = MARKS[0];

/// Longest wait for bytes that need not come: it happens once at the end of data that arrived fast.
pub(super) const BURST_TIMEOUT: Duration = Duration::from_micros(500);

/// State of a receiving half's socket.
#[derive(Debug)]
pub(super) struct LowWater {
    /// The socket supports the mark, as far as is known.
    able: bool,
    /// The mark that was set last.
    mark: usize,
    /// The last read returned all available bytes.
    drained: bool,
    /// More data follows, like the last bytes.
    bulk: bool,
    /// When the last of these waits began.
    waited_at: Option<Instant>,
    /// Bytes since then.
    bytes: usize,
}

impl LowWater {
    /// For a socket whose mark was never set.
    pub(super) fn new(stream_kind: StreamKind) -> Self {
        let able = stream_kind == StreamKind::Tcp;
        Self { able, mark: 1, drained: false, bulk: false, waited_at: None, bytes: 0 }
    }

    /// From here on a wait is for one byte.
    pub(super) fn switch_off(&mut self) {
        self.able = false;
    }

    /// Whether more data like the last bytes follows; false if unknown.
    pub(super) fn set_bulk(&mut self, bulk: bool) {
        self.bulk = bulk && self.able;
        if !self.bulk {
            self.waited_at = None;
        }
    }

    /// Number of bytes to wait for if `due` bytes are certain to come.
    fn worth(&self, due: usize) -> usize {
        if self.able && due >= FEWEST { due.min(MAX_MARK) } else { 1 }
    }

    /// True if a wait pays before the next read: few bytes are available, but `due` bytes must come.
    pub(super) fn waits_first(&self, due: usize) -> bool {
        self.drained && self.worth(due) > 1
    }

    /// True if it pays to wait for a [`BURST_TIMEOUT`] before the next read; the mark is then set.
    pub(super) fn waits_briefly(&mut self, fd: BorrowedFd<'_>) -> bool {
        if !(self.bulk && self.drained) {
            return false;
        }
        let now = Instant::now();
        let bytes = std::mem::take(&mut self.bytes);
        let pace = self.waited_at.replace(now).map(|at| (bytes, now.duration_since(at)));
        let mark = pace.and_then(|(bytes, time)| mark_at_pace(bytes, time));
        mark.is_some_and(|mark| self.tell(fd, mark) > 1)
    }

    /// Before a wait: sets the mark. True if fewer bytes than the mark may stay in the socket meanwhile.
    pub(super) fn before_wait(&mut self, fd: BorrowedFd<'_>, due: usize) -> bool {
        self.tell(fd, self.worth(due)) > 1
    }

    /// A read has returned `count` bytes and had room for `room`.
    pub(super) fn took(&mut self, count: usize, room: usize) {
        self.drained = count < room;
        self.bytes += count;
    }

    /// The mark that was set last.
    #[cfg(test)]
    pub(super) fn mark(&self) -> usize {
        self.mark
    }

    /// Restores the initial mark: another process may use the socket after us.
    pub(super) fn put_back(&mut self, fd: BorrowedFd<'_>) {
        self.tell(fd, 1);
    }

    fn tell(&mut self, fd: BorrowedFd<'_>, mark: usize) -> usize {
        if mark != self.mark {
            match set_low_water(fd, mark) {
                Ok(()) => self.mark = mark,
                Err(error) => {
                    tracing::debug!(%error, mark, "no low-water mark");
                    self.able = false;
                }
            }
        }
        self.mark
    }
}

/// The largest mark that arrives within half of a [`BURST_TIMEOUT`] if `bytes` came in `time`.
fn mark_at_pace(bytes: usize, time: Duration) -> Option<usize> {
    let comes = bytes as u128 * (BURST_TIMEOUT / 2).as_nanos();
    MARKS.into_iter().find(|mark| *mark as u128 * time.as_nanos() <= comes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_mark_is_what_comes_within_half_a_moment() {
        let at = |bytes, micros| mark_at_pace(bytes, Duration::from_micros(micros));
        assert_eq!(at(1 << 20, 250), Some(1 << 20));
        assert_eq!(at(10 << 20, 100), Some(1 << 20), "never more");
        assert_eq!(at((1 << 20) - 1, 250), Some(512 << 10));
        assert_eq!(at(128 << 10, 250), Some(128 << 10));
        assert_eq!(at(64 << 10, 250), None, "too slow to wait for more");
        assert_eq!(at(0, 250), None);
    }

    #[test]
    fn only_what_must_come_or_follows_at_a_pace_is_waited_for() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut water = LowWater::new(StreamKind::Tcp);
        water.took(10, 100);
        assert!(
            !water.waits_briefly(near.as_fd()) && !water.waits_first(FEWEST - 1) && water.waits_first(FEWEST)
        );
        water.set_bulk(true);
        assert!(!water.waits_briefly(near.as_fd()), "the pace is not known yet");
        water.took(100 << 20, 200 << 20);
        assert!(water.waits_briefly(near.as_fd()));
        assert!(!water.waits_briefly(near.as_fd()), "nothing came of it");
        water.took(100 << 20, 100 << 20);
        assert!(
            !water.waits_briefly(near.as_fd()) && !water.waits_first(FEWEST),
            "there may be more already"
        );
        water.took(100 << 20, 200 << 20);
        water.set_bulk(false);
        assert!(!water.waits_briefly(near.as_fd()));
    }

    #[test]
    fn other_sockets_wait_for_a_byte() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut water = LowWater::new(StreamKind::Socket);
        water.set_bulk(true);
        for _ in 0..3 {
            water.took(100 << 20, 200 << 20);
            assert!(!water.waits_briefly(near.as_fd()) && !water.waits_first(1 << 20));
            assert!(!water.before_wait(near.as_fd(), 1 << 20));
        }
    }
}
