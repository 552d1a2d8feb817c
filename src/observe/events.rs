//! The figures as the migration's threads write and anybody reads them, and what happened as a stream of events.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};

use super::{RoundReport, Statistics, Status};

/// Events that wait for a reader at most.
const MOST_WAITING: usize = 4096;

/// Of them, places that rounds leave for changes of state: a migration has fewer of those.
const FOR_STATES: usize = 16;

/// Something that happened in a migration.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// When.
    pub at: Instant,
    /// What.
    pub kind: EventKind,
}

/// What happened. A migration begins with [`Setup`](Self::Setup) and ends with one of the last four.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum EventKind {
    /// It begins: the peer is greeted.
    Setup,
    /// Pages travel while the guest runs.
    Active,
    /// A round was closed (at the source).
    Round(RoundReport),
    /// The guest is asked to stand still: the downtime begins (at the source).
    Switchover,
    /// COMMIT is due: from here on the guest is not the source's (at the source).
    GivenAway,
    /// The guest runs at the destination.
    Completed,
    /// It failed; the guest is the source's.
    Failed {
        /// Why.
        why: String,
    },
    /// It was cancelled; the guest is the source's.
    Cancelled,
    /// The guest was given away and nobody said that it runs.
    InDoubt {
        /// Why nobody knows.
        why: String,
    },
}

impl EventKind {
    /// No event follows.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Completed | Self::Failed { .. } | Self::Cancelled | Self::InDoubt { .. })
    }

    /// What a change from `before` to `now` means, in order.
    fn of_change(before: &Seen, now: &Statistics) -> impl Iterator<Item = Self> {
        let round = now.rounds.last().filter(|round| round.round != before.round);
        let state = match now.status {
            _ if now.ended || now.status == before.status => None,
            Status::Setup => Some(Self::Setup),
            Status::Active => Some(Self::Active),
            // Held after its pause, and let go on: told before.
            Status::Device if before.status == Status::PreSwitchover => None,
            Status::Device => Some(Self::Switchover),
            Status::InDoubt => Some(Self::GivenAway),
            Status::None | Status::PreSwitchover | Status::Completed | Status::Failed | Status::Cancelled => {
                None
            }
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

/// What of the figures makes events.
struct Seen {
    status: Status,
    round: u32,
    ended: bool,
}

/// The figures as the migration's threads write and anybody reads them.
#[derive(Clone, Debug, Default)]
pub struct SharedStatistics(Arc<Mutex<Shared>>);

#[derive(Debug, Default)]
struct Shared {
    statistics: Statistics,
    readers: Vec<Sender<Event>>,
}

impl SharedStatistics {
    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the figures; once a slice, never per page.
    pub fn update(&self, change: impl FnOnce(&mut Statistics)) {
        let mut shared = self.lock();
        let Shared { statistics, readers } = &mut *shared;
        let before =
            Seen { status: statistics.status, round: statistics.round_count(), ended: statistics.ended };
        change(statistics);
        if readers.is_empty() {
            return;
        }
        for kind in EventKind::of_change(&before, statistics) {
            let event = Event { at: Instant::now(), kind };
            readers.retain(|reader| tell(reader, &event));
        }
        if statistics.ended {
            readers.clear();
        }
    }

    /// Nobody writes any more: channels of events end.
    pub(crate) fn close(&self) {
        self.lock().readers.clear();
    }

    /// A consistent copy.
    pub fn snapshot(&self) -> Statistics {
        self.lock().statistics.clone()
    }

    /// What happens from now on. Nobody waits for a slow reader: it misses rounds where thousands wait for it, and
    /// never a change of state. The channel ends with the migration.
    pub fn events(&self) -> Receiver<Event> {
        let (sender, receiver) = bounded(MOST_WAITING);
        let mut shared = self.lock();
        if !shared.statistics.ended {
            shared.readers.push(sender);
        }
        receiver
    }
}

/// False if nobody reads there any more.
fn tell(reader: &Sender<Event>, event: &Event) -> bool {
    let is_round = matches!(event.kind, EventKind::Round(_));
    if is_round && reader.len() >= MOST_WAITING - FOR_STATES {
        return true;
    }
    !matches!(reader.try_send(event.clone()), Err(TrySendError::Disconnected(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(events: &Receiver<Event>) -> Vec<EventKind> {
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
        shared.update(|s| s.status = Status::InDoubt);
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
    fn an_end_in_doubt_is_told_apart_from_the_guest_given_away() {
        let shared = SharedStatistics::default();
        let events = shared.events();
        shared.update(|s| s.status = Status::InDoubt);
        shared.update(|s| (s.error, s.ended) = (Some("silence".into()), true));
        let in_doubt = EventKind::InDoubt { why: "silence".into() };
        assert_eq!(kinds(&events), [EventKind::GivenAway, in_doubt]);
    }

    #[test]
    fn a_reader_that_sleeps_misses_rounds_and_no_state_and_stops_nobody() {
        let shared = SharedStatistics::default();
        let (sleeps, gone) = (shared.events(), shared.events());
        drop(gone);
        for round in 1..=2 * MOST_WAITING as u32 {
            shared.update(|s| s.push_round(RoundReport { round, ..RoundReport::default() }));
        }
        assert_eq!(shared.lock().readers.len(), 1, "who is gone is forgotten");
        shared.update(|s| (s.status, s.ended) = (Status::Cancelled, true));
        assert!(shared.events().recv().is_err(), "nothing follows the end");
        let kinds = kinds(&sleeps);
        assert_eq!(kinds.len(), MOST_WAITING - FOR_STATES + 1);
        assert_eq!(kinds.last(), Some(&EventKind::Cancelled));
        assert!(kinds.iter().filter(|kind| kind.is_last()).count() == 1);
    }
}
