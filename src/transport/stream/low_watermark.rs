//! Waits that end when much has come, and not with its first segment.
//!
//! A receiver that is faster than its sender sleeps, and is woken for each segment. On a fast link, and most over the
//! loopback, where the sender does the waking, that costs both ends. So where it is known how much must come, the kernel
//! is told to wake for that (SO_RCVLOWAT); where more of the same follows at a great pace, a moment is waited for much of
//! it. TCP only: a UNIX socket takes the mark and does not heed it, and one of vsock has no room beyond it.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::Nature;
use crate::sys::set_low_water;

/// Fewest bytes that a wait is for: they come in one or two segments anyway.
const FEWEST: usize = 32 << 10;

/// Bytes that a wait is for where they need not come, by pace.
const MARKS: [usize; 4] = [1 << 20, 512 << 10, 256 << 10, 128 << 10];

/// Most bytes that any wait is for. The kernel's own limit is half of what it gives a receive buffer, 3 MiB by default.
const MOST: usize = MARKS[0];

/// Longest wait for bytes that need not come: once at the end of all that came at a great pace.
pub(super) const BURST_TIMEOUT: Duration = Duration::from_micros(500);

/// What a receiving half knows of its socket.
#[derive(Debug)]
pub(super) struct LowWater {
    /// The socket can be told, as far as is known.
    able: bool,
    /// The mark that the kernel was told last.
    mark: usize,
    /// The last read took all there was.
    drained: bool,
    /// More follows, like the last bytes.
    bulk: bool,
    /// When the last wait among those began.
    waited_at: Option<Instant>,
    /// Bytes since then.
    bytes: usize,
}

impl LowWater {
    /// Of a socket that nobody has told anything.
    pub(super) fn new(nature: Nature) -> Self {
        let able = nature == Nature::Tcp;
        Self { able, mark: 1, drained: false, bulk: false, waited_at: None, bytes: 0 }
    }

    /// From here on a wait is for a byte.
    pub(super) fn switch_off(&mut self) {
        self.able = false;
    }

    /// More of the same follows the last bytes, or that is not known.
    pub(super) fn set_bulk(&mut self, bulk: bool) {
        self.bulk = bulk && self.able;
        if !self.bulk {
            self.waited_at = None;
        }
    }

    /// What a wait is for, `due` bytes being sure to come.
    fn worth(&self, due: usize) -> usize {
        if self.able && due >= FEWEST { due.min(MOST) } else { 1 }
    }

    /// True if a wait pays before there is another look at what has come: little, where `due` bytes must.
    pub(super) fn waits_first(&self, due: usize) -> bool {
        self.drained && self.worth(due) > 1
    }

    /// True if it pays to wait for a [`BURST_TIMEOUT`] before the next read; the kernel knows then what for.
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

    /// Before a wait: tells the kernel what it is for. True if bytes may stay there meanwhile, short of the mark.
    pub(super) fn before_wait(&mut self, fd: BorrowedFd<'_>, due: usize) -> bool {
        self.tell(fd, self.worth(due)) > 1
    }

    /// A read has taken `count` bytes and had room for `room`.
    pub(super) fn took(&mut self, count: usize, room: usize) {
        self.drained = count < room;
        self.bytes += count;
    }

    /// The mark that the kernel was told last.
    #[cfg(test)]
    pub(super) fn mark(&self) -> usize {
        self.mark
    }

    /// As it was found: another process may use the socket after us.
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

/// The largest mark that half of a [`BURST_TIMEOUT`] is enough for where `bytes` came in `time`.
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
        let mut water = LowWater::new(Nature::Tcp);
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
        let mut water = LowWater::new(Nature::Socket);
        water.set_bulk(true);
        for _ in 0..3 {
            water.took(100 << 20, 200 << 20);
            assert!(!water.waits_briefly(near.as_fd()) && !water.waits_first(1 << 20));
            assert!(!water.before_wait(near.as_fd(), 1 << 20));
        }
    }
}
