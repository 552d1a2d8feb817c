//! The queue of a migration's events for a reader, which may wait for them by a descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::{RecvError, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam::channel::{self, Receiver, Sender, TrySendError, bounded};

use super::Event;
use crate::sys::WakeEvent;

/// Maximum number of events that wait for a reader.
pub(super) const MAX_WAITING: usize = 4096;

/// Number of these that rounds and syncs leave for changes of state: a migration has fewer of those.
pub(super) const FOR_STATES: usize = 16;

/// The events of a migration, in order, until it ends. Any thread may read; clones read from the same queue, and each
/// event goes to one of them.
///
/// A VMM that waits with epoll(7) adds [`descriptor`](Self::descriptor) for reading and takes events by
/// [`try_recv`](Self::try_recv) until there is none.
#[derive(Clone, Debug)]
pub struct Events {
    queue: Receiver<Event>,
    wake: Arc<OnceLock<WakeEvent>>,
}

impl Events {
    /// The next event; waits for it.
    ///
    /// # Errors
    /// The migration has ended, and all its events were read.
    pub fn recv(&self) -> Result<Event, RecvError> {
        self.queue.recv().map_err(|_| RecvError)
    }

    /// The next event; waits at most `time`.
    ///
    /// # Errors
    /// As [`recv`](Self::recv), or none arrived in time.
    pub fn recv_timeout(&self, time: Duration) -> Result<Event, RecvTimeoutError> {
        self.queue.recv_timeout(time).map_err(|error| match error {
            channel::RecvTimeoutError::Timeout => RecvTimeoutError::Timeout,
            channel::RecvTimeoutError::Disconnected => RecvTimeoutError::Disconnected,
        })
    }

    /// The next event, if there is one. A result of [`TryRecvError::Empty`] makes the [descriptor](Self::descriptor)
    /// unreadable until there is one.
    ///
    /// # Errors
    /// As [`recv`](Self::recv), or there is none.
    pub fn try_recv(&self) -> Result<Event, TryRecvError> {
        let mut taken = self.queue.try_recv();
        if let (Err(channel::TryRecvError::Empty), Some(wake)) = (&taken, self.wake.get()) {
            wake.clear();
            // An event that came in between would not wake the reader.
            taken = self.queue.try_recv();
            if !matches!(taken, Err(channel::TryRecvError::Empty)) {
                wake.raise();
            }
        }
        taken.map_err(|error| match error {
            channel::TryRecvError::Empty => TryRecvError::Empty,
            channel::TryRecvError::Disconnected => TryRecvError::Disconnected,
        })
    }

    /// The events that are there.
    pub fn try_iter(&self) -> impl Iterator<Item = Event> + '_ {
        std::iter::from_fn(|| self.try_recv().ok())
    }

    /// Waits for each event until the migration has ended.
    pub fn iter(&self) -> impl Iterator<Item = Event> + '_ {
        std::iter::from_fn(|| self.recv().ok())
    }

    /// A descriptor (an eventfd) that is readable while events wait, and permanently once the migration has ended: for
    /// poll(2), select(2) and epoll(7). Don't read from it. It is created at the first call; clones share it.
    ///
    /// # Errors
    /// No descriptor left (EMFILE, ENFILE), or no memory.
    pub fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        if self.wake.get().is_none() {
            let new = WakeEvent::new()?;
            // Earlier events have not raised it, so the reader checks the queue once.
            new.raise();
            // If another thread has set one first, this one is closed again.
            let _ = self.wake.set(new);
            // Either the writer sees the descriptor, or the reader sees the event.
            fence(Ordering::SeqCst);
        }
        Ok(self.wake.get().ok_or(io::ErrorKind::Other)?.as_fd())
    }

    /// For a thread that also waits for other channels.
    pub(crate) fn queue(&self) -> &Receiver<Event> {
        &self.queue
    }
}

/// The sending half of a queue. Dropped when the migration ends.
#[derive(Debug)]
pub(super) struct EventSender {
    /// `None` only while it is dropped.
    queue: Option<Sender<Event>>,
    wake: Arc<OnceLock<WakeEvent>>,
}

impl EventSender {
    pub(super) fn pair() -> (Self, Events) {
        let (sender, queue) = bounded(MAX_WAITING);
        let wake = Arc::new(OnceLock::new());
        (Self { queue: Some(sender), wake: Arc::clone(&wake) }, Events { queue, wake })
    }

    /// False if the queue has no reader any more. Does not wait for a slow reader, which then misses frequent events.
    pub(super) fn send(&self, event: &Event) -> bool {
        let Some(queue) = &self.queue else { return false };
        if event.kind.is_frequent() && queue.len() >= MAX_WAITING - FOR_STATES {
            return true;
        }
        let sent = queue.try_send(event.clone());
        self.wake_reader();
        !matches!(sent, Err(TrySendError::Disconnected(_)))
    }

    fn wake_reader(&self) {
        fence(Ordering::SeqCst);
        if let Some(wake) = self.wake.get() {
            wake.raise();
        }
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        self.queue = None;
        self.wake_reader();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Instant;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::observe::EventKind;

    fn event(kind: EventKind) -> Event {
        Event { at: Instant::now(), kind }
    }

    fn readable(events: &Events) -> bool {
        let descriptor = events.descriptor().unwrap();
        let mut wanted = [PollFd::new(&descriptor, PollFlags::IN)];
        poll(&mut wanted, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }

    #[test]
    fn the_descriptor_is_readable_while_events_wait_and_after_the_end() {
        let (sender, events) = EventSender::pair();
        assert!(sender.send(&event(EventKind::Setup)));
        assert!(readable(&events), "an event that came before the descriptor");
        assert_eq!(events.try_recv().unwrap().kind, EventKind::Setup);
        assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
        assert!(!readable(&events));
        let clone = events.clone();
        assert!(sender.send(&event(EventKind::Active)) && sender.send(&event(EventKind::Switchover)));
        assert!(readable(&clone));
        assert_eq!(clone.try_recv().unwrap().kind, EventKind::Active);
        assert!(readable(&events), "one is left");
        assert_eq!(events.recv().unwrap().kind, EventKind::Switchover);
        assert_eq!(events.try_recv(), Err(TryRecvError::Empty));
        drop(sender);
        for _ in 0..2 {
            assert!(readable(&events));
            assert_eq!(events.try_recv(), Err(TryRecvError::Disconnected));
        }
        assert!(events.iter().next().is_none());
    }

    #[test]
    fn a_descriptor_that_is_asked_for_after_the_end_is_readable() {
        let (sender, events) = EventSender::pair();
        drop(sender);
        assert!(readable(&events));
    }

    /// A reader that sleeps in poll(2) whenever the queue is empty misses no event, for any interleaving with the
    /// writer.
    #[test]
    fn a_reader_that_waits_by_the_descriptor_misses_nothing() {
        const EVENTS: usize = 20_000;
        let (sender, events) = EventSender::pair();
        let writer = std::thread::spawn(move || {
            for _ in 0..EVENTS {
                assert!(sender.send(&event(EventKind::Setup)));
                while sender.queue.as_ref().unwrap().len() > MAX_WAITING / 2 {
                    std::thread::yield_now();
                }
            }
        });
        let mut seen = 0;
        loop {
            match events.try_recv() {
                Ok(_) => seen += 1,
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    let descriptor = events.descriptor().unwrap();
                    let mut wanted = [PollFd::new(&descriptor, PollFlags::IN)];
                    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
                    assert_eq!(poll(&mut wanted, Some(&limit)).unwrap(), 1, "after {seen} events");
                }
            }
        }
        writer.join().unwrap();
        assert_eq!(seen, EVENTS);
    }
}
