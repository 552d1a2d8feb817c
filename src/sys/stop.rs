//! When a wait must end: at a deadline, by a cancel, or both. No wait of this crate ignores it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Why a wait ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The deadline passed.
    Deadline,
    /// It was cancelled.
    Cancelled,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Deadline => "the time for it was over",
            Self::Cancelled => "cancelled",
        })
    }
}

/// A flag that wakes every wait that watches it. Clones share the flag.
#[derive(Clone, Debug)]
pub struct CancelToken(Arc<Flag>);

#[derive(Debug)]
struct Flag {
    raised: Arc<AtomicBool>,
    /// Readable from the moment the flag is raised. `None` if the kernel had no descriptor left: waits then check the
    /// flag every [`POLL_INTERVAL`].
    event: Option<OwnedFd>,
}

/// Interval at which a wait without an event descriptor checks the flag.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

impl Default for CancelToken {
    fn default() -> Self {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).ok();
        Self(Arc::new(Flag { raised: Arc::default(), event }))
    }
}

impl CancelToken {
    /// Raises the flag and wakes every wait. Never blocks; safe to call twice.
    pub fn cancel(&self) {
        self.0.raised.store(true, Ordering::Release);
        if let Some(event) = &self.0.event {
            // A full counter means that the flag is already readable.
            let _ = rustix::io::write(event, &1u64.to_ne_bytes());
        }
    }

    /// True once [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.raised.load(Ordering::Acquire)
    }
}

/// A deadline and a cancel token, checked by every wait.
#[derive(Clone, Debug)]
pub struct Stop {
    deadline: Option<Instant>,
    cancel: CancelToken,
}

impl Stop {
    /// Waits end only when `cancel` is raised.
    pub fn on(cancel: &CancelToken) -> Self {
        Self { deadline: None, cancel: cancel.clone() }
    }

    /// Waits end only by themselves, or by a deadline that [`within`](Self::within) adds. Costs no system call: all of
    /// these share one token that is never raised.
    pub fn never() -> Self {
        static NEVER: OnceLock<CancelToken> = OnceLock::new();
        Self::on(NEVER.get_or_init(CancelToken::default))
    }

    /// The same token with a deadline `time` from now, or the earlier one it has.
    pub fn within(&self, time: Duration) -> Self {
        let new = Instant::now().checked_add(time);
        let deadline = match (self.deadline, new) {
            (Some(old), Some(new)) => Some(old.min(new)),
            (old, new) => old.or(new),
        };
        Self { deadline, cancel: self.cancel.clone() }
    }

    /// Time until the deadline; `None` without one.
    pub fn left(&self) -> Option<Duration> {
        self.deadline.map(|at| at.saturating_duration_since(Instant::now()))
    }

    /// The cancel token's flag, for waits of another crate: true means cancelled.
    pub fn cancel_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.cancel.0.raised)
    }

    /// The reason to stop now, if any.
    pub fn reason(&self) -> Option<StopReason> {
        if self.cancel.is_cancelled() {
            return Some(StopReason::Cancelled);
        }
        (self.left() == Some(Duration::ZERO)).then_some(StopReason::Deadline)
    }

    /// Waits until `fd` is ready for `what` (or broken, which the next call on it reports).
    ///
    /// # Errors
    /// The error of `poll(2)`. `Ok(Some(reason))` if the wait was stopped.
    pub fn wait(&self, fd: BorrowedFd<'_>, what: PollFlags) -> io::Result<Option<StopReason>> {
        loop {
            if let Some(reason) = self.reason() {
                return Ok(Some(reason));
            }
            if self.poll_once(fd, what, self.time_to_poll())? {
                return Ok(None);
            }
        }
    }

    /// Waits until one of `fds` is readable (or broken, which the next call on it reports).
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub fn wait_any(&self, fds: &[BorrowedFd<'_>]) -> io::Result<Option<StopReason>> {
        loop {
            if let Some(reason) = self.reason() {
                return Ok(Some(reason));
            }
            let event = self.cancel.0.event.as_ref().map(AsFd::as_fd);
            let all = fds.iter().copied().chain(event);
            let mut polled: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let timeout = self.time_to_poll().and_then(|time| Timespec::try_from(time).ok());
            match poll(&mut polled, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            if polled.iter().take(fds.len()).any(|fd| !fd.revents().is_empty()) {
                return Ok(None);
            }
        }
    }

    /// Longest time of one poll: to the deadline, or without an event descriptor to the next check of the flag. Rounded
    /// up to a millisecond, so that a short rest does not spin.
    fn time_to_poll(&self) -> Option<Duration> {
        let left = match (&self.cancel.0.event, self.left()) {
            (Some(_), left) => left,
            (None, left) => Some(left.map_or(POLL_INTERVAL, |left| left.min(POLL_INTERVAL))),
        };
        left.map(|left| left.max(Duration::from_millis(1)))
    }

    /// Waits for a very short time without reporting why it ended: at most `time`, with a resolution of a microsecond
    /// instead of the millisecond of [`wait`](Self::wait). The next call on `fd`, and [`reason`](Self::reason), show
    /// why it ended. True if `fd` is ready.
    ///
    /// # Errors
    /// The error of `poll(2)`.
    pub fn wait_briefly(&self, fd: BorrowedFd<'_>, what: PollFlags, time: Duration) -> io::Result<bool> {
        self.poll_once(fd, what, Some(time))
    }

    /// Waits once, for `fd`, the cancel or the time; true if `fd` is ready.
    fn poll_once(&self, fd: BorrowedFd<'_>, what: PollFlags, time: Option<Duration>) -> io::Result<bool> {
        let timeout = time.and_then(|time| Timespec::try_from(time).ok());
        let event = self.cancel.0.event.as_ref().map_or(fd, AsFd::as_fd);
        let watch = if self.cancel.0.event.is_some() { PollFlags::IN } else { what };
        let mut fds = [PollFd::from_borrowed_fd(fd, what), PollFd::from_borrowed_fd(event, watch)];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => Ok(!fds[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Sleeps for `time`, or less if stopped; returns the reason if stopped.
    pub fn sleep(&self, time: Duration) -> Option<StopReason> {
        let until = self.within(time);
        loop {
            if let Some(reason) = self.reason() {
                return Some(reason);
            }
            // `None`: a time beyond the clock's range, so only a cancel ends the wait.
            let left = until.left();
            if left == Some(Duration::ZERO) {
                return None;
            }
            match &self.cancel.0.event {
                Some(event) => drop(until.wait_event(event.as_fd(), left)),
                None => std::thread::sleep(left.map_or(POLL_INTERVAL, |left| left.min(POLL_INTERVAL))),
            }
        }
    }

    fn wait_event(&self, event: BorrowedFd<'_>, left: Option<Duration>) -> io::Result<()> {
        let left = left.map(|left| left.max(Duration::from_millis(1)));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
        poll(&mut fds, timeout.as_ref())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_wait_ends_by_data_by_deadline_and_by_cancel() {
        let (near, far) = UnixStream::pair().unwrap();
        let cancel = CancelToken::default();
        let stop = Stop::on(&cancel);
        let short = stop.within(Duration::from_millis(5));
        assert_eq!(short.wait(near.as_fd(), PollFlags::IN).unwrap(), Some(StopReason::Deadline));
        rustix::io::write(&far, b"x").unwrap();
        assert_eq!(stop.wait(near.as_fd(), PollFlags::IN).unwrap(), None);
        let other = cancel.clone();
        let waker = std::thread::spawn(move || {
            assert_eq!(stop.wait(far.as_fd(), PollFlags::IN).unwrap(), Some(StopReason::Cancelled));
            assert_eq!(stop.sleep(Duration::from_secs(60)), Some(StopReason::Cancelled));
        });
        other.cancel();
        waker.join().unwrap();
    }

    #[test]
    fn a_sleep_longer_than_the_clock_lasts_until_the_cancel() {
        let cancel = CancelToken::default();
        let stop = Stop::on(&cancel);
        let sleeper = std::thread::spawn(move || stop.sleep(Duration::MAX));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!sleeper.is_finished(), "nobody has cancelled");
        cancel.cancel();
        assert_eq!(sleeper.join().unwrap(), Some(StopReason::Cancelled));
    }

    #[test]
    fn the_earlier_deadline_wins() {
        let stop = Stop::on(&CancelToken::default()).within(Duration::from_secs(1));
        assert!(stop.within(Duration::from_secs(60)).left().unwrap() <= Duration::from_secs(1));
        assert_eq!(stop.within(Duration::ZERO).reason(), Some(StopReason::Deadline));
    }
}
