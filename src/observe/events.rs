//! The figures, which the migration's threads write and any thread reads, and the stream of events.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::event_queue::EventSender;
use super::{Events, RoundReport, Statistics, Status, named};
use crate::sys::Lock as _;

/// An event of a migration.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When.
    pub at: Instant,
    /// What.
    pub kind: EventKind,
}

/// The kinds of events, in this order; a round has one sync before it, and the last sync comes while the guest is
/// paused. A migration begins with [`Setup`](Self::Setup) and ends with one of the last four before
/// [`CleanedUp`](Self::CleanedUp).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// It begins: dirty logs are started, the peer receives the greeting.
    Setup,
    /// Setup is over. Pages are sent while the guest runs.
    Active,
    /// The dirty logs are about to be read (at the source). No hint is accepted any more
    /// ([`PageHints`](crate::guest::PageHints)): a balloon may return pages to its guest.
    SyncBegins {
        /// The guest is paused.
        last: bool,
    },
    /// The dirty logs were read (at the source). Hints are accepted from here on, except after the last sync.
    Synced {
        /// Number of pages to send.
        dirty_pages: u64,
        /// The guest is paused.
        last: bool,
    },
    /// A round was closed (at the source).
    Round(RoundReport),
    /// There is no sign that the rounds will end (at the source). Reported once; the migration continues.
    NotConverging(NotConverging),
    /// Further connections were asked for, and the two ends have none: the loss of this one ends the migration (at the
    /// source). Reported once.
    NotReplaceable {
        /// Why there are none.
        why: String,
    },
    /// The guest is about to be paused: the downtime begins (at the source).
    Switchover,
    /// The guest is paused, and the migration waits for its embedder
    /// ([`Control::continue_switchover`](crate::session::Control::continue_switchover), at the source).
    PreSwitchover,
    /// COMMIT is due: from here on the source no longer owns the guest (at the source).
    GivenAway,
    /// The guest runs at the destination, and its pages follow; also after a recovery.
    PostcopyActive,
    /// The connection was lost in postcopy: no page is lost, and both ends wait for another connection.
    PostcopyPaused,
    /// Another connection is open, and the ends compare which pages are missing.
    PostcopyRecover,
    /// The guest runs at the destination.
    Completed,
    /// It failed; the source owns the guest.
    Failed {
        /// Why.
        why: String,
    },
    /// It was cancelled; the source owns the guest.
    Cancelled,
    /// The guest was handed over, and no RUNNING arrived.
    InDoubt {
        /// Why it is unknown whether the guest runs.
        why: String,
    },
    /// The connection is closed, the logs are stopped, and the memory is its owner's again. No event follows.
    CleanedUp,
}

/// State of a migration that does not converge. Sizes in bytes, rates in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotConverging {
    /// Rounds so far.
    pub rounds: u32,
    /// Bytes left to send.
    pub remaining: u64,
    /// What the guest writes.
    pub written_per_second: u64,
    /// What leaves.
    pub sent_per_second: u64,
    /// Expected downtime if the guest were paused now, in milliseconds.
    pub expected_downtime_ms: Option<f64>,
    /// How long it may.
    pub downtime_limit_ms: f64,
}

impl fmt::Display for NotConverging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mega = |bytes: u64| bytes as f64 / 1e6;
        write!(
            f,
            "after {} rounds {:.1} MB remain; the guest writes {:.1} MB/s, {:.1} MB/s are sent",
            self.rounds,
            mega(self.remaining),
            mega(self.written_per_second),
            mega(self.sent_per_second)
        )?;
        match self.expected_downtime_ms {
            Some(ms) => write!(
                f,
                "; pausing it now would take {ms:.0} ms, the limit is {:.0}",
                self.downtime_limit_ms
            ),
            None => Ok(()),
        }
    }
}

impl EventKind {
    /// It reports how the migration ended: only [`CleanedUp`](Self::CleanedUp) follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed { .. } | Self::Cancelled | Self::InDoubt { .. })
    }

    /// It comes as often as rounds do, and may be missed.
    pub(super) fn is_frequent(&self) -> bool {
        matches!(self, Self::Round(_) | Self::SyncBegins { .. } | Self::Synced { .. })
    }

    /// The events of a change from `before` to `now`, in order.
    fn of_change(before: &Seen, now: &Statistics) -> impl Iterator<Item = Self> {
        let round = now.rounds.last().filter(|round| round.round != before.round);
        let state = match now.status {
            _ if now.ended || now.status == before.status => None,
            Status::Setup => Some(Self::Setup),
            Status::Active => Some(Self::Active),
            // Held after its pause, and continued: already reported.
            Status::Device if before.status == Status::PreSwitchover => None,
            Status::Device => Some(Self::Switchover),
            Status::HandingOver => Some(Self::GivenAway),
            Status::PostcopyActive => Some(Self::PostcopyActive),
            Status::PreSwitchover => Some(Self::PreSwitchover),
            Status::PostcopyPaused => Some(Self::PostcopyPaused),
            Status::PostcopyRecover => Some(Self::PostcopyRecover),
            Status::None | Status::Completed | Status::Failed | Status::Cancelled | Status::InDoubt => None,
        };
        let end = (now.ended && !before.ended).then(|| Self::of_end(now));
        round.copied().map(Self::Round).into_iter().chain(state).chain(end)
    }

    fn of_end(now: &Statistics) -> Self {
        let why = now.error.clone().unwrap_or_default();
        match now.status {
            Status::Completed => Self::Completed,
            Status::Cancelled => Self::Cancelled,
            Status::InDoubt => Self::InDoubt { why },
            _ => Self::Failed { why },
        }
    }
}

/// The part of the figures that makes events.
struct Seen {
    status: Status,
    round: u32,
    ended: bool,
}

/// A callback that runs while the migration waits.
type Listener = Box<dyn FnMut(&Event) + Send>;

/// The figures, which the migration's threads write and any thread reads.
#[derive(Clone, Debug, Default)]
pub struct SharedStatistics(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    shared: Mutex<Shared>,
    listeners: Listeners,
}

#[derive(Default)]
struct Listeners(Mutex<Vec<Listener>>);

#[derive(Debug, Default)]
struct Shared {
    statistics: Statistics,
    readers: Vec<EventSender>,
    /// Number of listeners that are called while the migration waits.
    listeners: usize,
    refresh: Refresh,
}

/// Updates figures before they are read.
type Refresher = Box<dyn FnMut(&mut Statistics) + Send>;

#[derive(Default)]
struct Refresh(Option<Refresher>);

impl fmt::Debug for Refresh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl Shared {
    fn tell(&mut self, kind: EventKind) -> Event {
        let event = Event { at: Instant::now(), kind };
        self.readers.retain(|reader| reader.send(&event));
        event
    }

    fn refresh(&mut self) {
        if let Refresh(Some(refresh)) = &mut self.refresh {
            refresh(&mut self.statistics);
        }
    }

    fn has_listener(&self) -> bool {
        self.listeners > 0 || !self.readers.is_empty()
    }
}

impl fmt::Debug for Listeners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl SharedStatistics {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.shared.locked()
    }

    fn listeners(&self) -> MutexGuard<'_, Vec<Listener>> {
        self.0.listeners.0.locked()
    }

    /// Changes the figures; once a slice, never per page.
    pub fn update(&self, change: impl FnOnce(&mut Statistics)) {
        let mut shared = self.lock();
        let statistics = &mut shared.statistics;
        let before =
            Seen { status: statistics.status, round: statistics.round_count(), ended: statistics.ended };
        change(statistics);
        if !shared.has_listener() {
            return;
        }
        let kinds: Vec<_> = EventKind::of_change(&before, &shared.statistics).collect();
        let events: Vec<_> = kinds.into_iter().map(|kind| shared.tell(kind)).collect();
        drop(shared);
        self.call(&events);
    }

    /// Reports an event that no figure shows.
    pub(crate) fn tell(&self, kind: EventKind) {
        let mut shared = self.lock();
        if shared.has_listener() {
            let event = shared.tell(kind);
            drop(shared);
            self.call(&[event]);
        }
    }

    fn call(&self, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        let mut listeners = self.listeners();
        let mut panicked = None;
        for event in events {
            for listener in listeners.iter_mut() {
                // The other listeners are still called.
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| listener(event))) {
                    panicked.get_or_insert(panic);
                }
            }
        }
        drop(listeners);
        if let Some(panic) = panicked {
            named("calling a listener of events", || resume_unwind(panic));
        }
    }

    /// Calls `listener` for every event from now on, on the migration's own thread, which waits for it: for actions
    /// that must happen before the migration continues. It may read figures and cancel; it may not wait for the
    /// migration's end, nor add another listener. Its time while the guest is paused is downtime. Its panic ends a
    /// migration like a failure; from [`EventKind::GivenAway`] on it is only logged.
    pub fn listen(&self, listener: impl FnMut(&Event) + Send + 'static) {
        self.listeners().push(Box::new(listener));
        self.lock().listeners += 1;
    }

    /// All resources of the migration are released: reports it, and ends the channels.
    pub(crate) fn cleaned_up(&self) {
        let told = catch_unwind(AssertUnwindSafe(|| self.tell(EventKind::CleanedUp)));
        self.close();
        self.listeners().clear();
        if let Err(panic) = told {
            resume_unwind(panic);
        }
    }

    /// No events follow: ends their channels.
    pub(crate) fn close(&self) {
        let mut shared = self.lock();
        shared.readers.clear();
        shared.listeners = 0;
    }

    /// Reads some of the figures, without a copy of them all.
    pub(crate) fn read<T>(&self, read: impl FnOnce(&Statistics) -> T) -> T {
        read(&self.lock().statistics)
    }

    /// A consistent copy.
    pub fn snapshot(&self) -> Statistics {
        let mut shared = self.lock();
        shared.refresh();
        shared.statistics.clone()
    }

    /// Sets `refresh` to update the figures whenever they are read. It must not read them itself.
    pub(crate) fn refresh_by(&self, refresh: impl FnMut(&mut Statistics) + Send + 'static) {
        self.lock().refresh = Refresh(Some(Box::new(refresh)));
    }

    /// Updates the figures for the last time.
    pub(crate) fn refresh_no_more(&self) {
        let mut shared = self.lock();
        shared.refresh();
        shared.refresh = Refresh::default();
    }

    /// The events from now on. The migration does not wait for a slow reader: it misses rounds and syncs while
    /// thousands of events wait, but never a change of state. The channel ends with the migration.
    pub fn events(&self) -> Events {
        let (sender, events) = EventSender::pair();
        let mut shared = self.lock();
        if !shared.statistics.ended {
            shared.readers.push(sender);
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::event_queue::{FOR_STATES, MAX_WAITING};

    fn kinds(events: &Events) -> Vec<EventKind> {
        events.try_iter().map(|event| event.kind).collect()
    }

    #[test]
    fn every_change_is_told_once_and_in_order() {
        let shared = SharedStatistics::default();
        let events = shared.events();
        for status in [Status::Setup, Status::Setup, Status::Active] {
            shared.update(|s| s.status = status);
        }
        let round = RoundReport { round: 1, dirty_pages: 9, ..RoundReport::default() };
        shared.update(|s| s.push_round(round));
        shared.update(|s| s.transferred += 1);
        shared.update(|s| s.status = Status::Device);
        shared.update(|s| s.status = Status::HandingOver);
        shared.update(|s| (s.status, s.ended) = (Status::Completed, true));
        shared.update(|s| s.total_time += 1.0);
        use EventKind::{Active, Completed, GivenAway, Round, Setup, Switchover};
        assert_eq!(
            kinds(&events),
            [Setup, Active, Round(round), Switchover, GivenAway, Completed],
            "each once"
        );
    }

    #[test]
    fn a_listener_is_told_at_once_and_may_read_the_figures() {
        let shared = SharedStatistics::default();
        let received = Arc::new(Mutex::new(Vec::new()));
        let (list, figures) = (Arc::clone(&received), shared.clone());
        shared.listen(move |event| {
            let status = figures.snapshot().status;
            list.locked().push((event.kind.clone(), status));
        });
        shared.update(|s| s.status = Status::Setup);
        shared.tell(EventKind::SyncBegins { last: false });
        shared.update(|s| (s.status, s.ended) = (Status::Completed, true));
        shared.cleaned_up();
        shared.cleaned_up();
        let received = received.locked();
        let expected = [
            (EventKind::Setup, Status::Setup),
            (EventKind::SyncBegins { last: false }, Status::Setup),
            (EventKind::Completed, Status::Completed),
            (EventKind::CleanedUp, Status::Completed),
        ];
        assert_eq!(received[..], expected);
    }

    #[test]
    fn an_end_in_doubt_is_told_apart_from_the_guest_given_away() {
        let shared = SharedStatistics::default();
        let events = shared.events();
        shared.update(|s| s.status = Status::HandingOver);
        shared.update(|s| (s.status, s.error, s.ended) = (Status::InDoubt, Some("silence".into()), true));
        let in_doubt = EventKind::InDoubt { why: "silence".into() };
        assert_eq!(kinds(&events), [EventKind::GivenAway, in_doubt]);
    }

    #[test]
    fn a_reader_that_sleeps_misses_rounds_and_no_state_and_stops_nobody() {
        let shared = SharedStatistics::default();
        let (sleeps, gone) = (shared.events(), shared.events());
        drop(gone);
        for round in 1..=2 * MAX_WAITING as u32 {
            shared.update(|s| s.push_round(RoundReport { round, ..RoundReport::default() }));
        }
        assert_eq!(shared.lock().readers.len(), 1, "who is gone is forgotten");
        shared.update(|s| (s.status, s.ended) = (Status::Cancelled, true));
        shared.cleaned_up();
        assert!(shared.events().recv().is_err(), "nothing follows the end");
        let kinds = kinds(&sleeps);
        assert_eq!(kinds.len(), MAX_WAITING - FOR_STATES + 2);
        assert_eq!(kinds[kinds.len() - 2..], [EventKind::Cancelled, EventKind::CleanedUp]);
        assert!(kinds.iter().filter(|kind| kind.is_last()).count() == 1);
    }
}
