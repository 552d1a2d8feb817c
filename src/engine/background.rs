//! How far ahead of its peer a source in postcopy is with pages that nobody waits for.
//!
//! A page that somebody waits for stands behind all that went before it on the same connection: in this host's queue, on the
//! way, and in the peer's queue, which alone may hold megabytes that are not placed yet. So marks (PING) stand between the
//! pages, and the peer answers each where it reads it. Pages behind the last answered mark are under way; only so many may
//! be that the connection stays busy. While there is no room the source reads what the peer says: no send that waits keeps
//! it from a request.
//!
//! The room follows the time in which marks are answered. A mark that is answered later than the fastest one has waited in a
//! queue. Of several answers the fastest counts, since one late answer may be a thread that was not scheduled.

use std::collections::VecDeque;
use std::time::Duration;

use super::Pace;

/// Target pages that may be under way at first, and at the least.
pub(crate) const FIRST_ROOM: u64 = 64;
/// The same at the most: 64 MiB of ordinary pages, what 10 Gbit/s carry in 50 ms.
const MAX_ROOM: u64 = 16 << 10;
/// Fewest pages between two marks, and what the room grows by. Always the same: what stands in front of a mark alone is no
/// queue.
const PIECE: u64 = 32;
/// Fewest answers after which the room may change.
const ANSWERS: u32 = 8;
/// With a queue shorter than this there is more room, with one longer than that there is less.
const SHORT_QUEUE: Duration = Duration::from_micros(100);
const LONG_QUEUE: Duration = Duration::from_micros(200);
/// Marks are PINGs with these values, whose low bits count: no PING of QEMU's, and none of a ramwire's greeting.
const MARK: u32 = 0x5250_0000;

/// What a source in postcopy does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextMissing {
    /// Sends what somebody waits for.
    Requested,
    /// Sends pages that nobody waits for.
    Background,
    /// Waits for so long, the limit of bytes a second, or for a request.
    Pause(Duration),
    /// Waits for the peer's next message.
    Full,
}

/// A PING between pages.
#[derive(Clone, Copy, Debug)]
struct Mark {
    value: u32,
    /// Pages in front of it, since the beginning.
    behind: u64,
    sent_at: Duration,
}

/// Answers since the room was changed last.
#[derive(Clone, Copy, Debug, Default)]
struct Answers {
    count: u32,
    /// Pages that had been sent by then.
    since: u64,
    fastest: Option<Duration>,
    /// There was no room meanwhile.
    full: bool,
}

/// The pages under way on one connection, and how fast those may leave that nobody waits for.
#[derive(Debug)]
pub struct Background {
    pace: Pace,
    room: u64,
    /// Pages that were sent, and of them those that the peer has read.
    sent: u64,
    read: u64,
    marks: VecDeque<Mark>,
    number: u16,
    /// The fastest answer of all.
    fastest: Option<Duration>,
    answers: Answers,
    /// No queue has been long yet: the room doubles.
    starting: bool,
}

impl Background {
    /// Nothing sent yet. `pace` is for pages that nobody waits for.
    pub fn new(pace: Pace) -> Self {
        Self {
            pace,
            room: FIRST_ROOM,
            sent: 0,
            read: 0,
            marks: VecDeque::new(),
            number: 0,
            fastest: None,
            answers: Answers::default(),
            starting: true,
        }
    }

    /// Another connection follows. The limit of bytes a second goes on.
    pub fn forget_connection(&mut self) {
        *self = Self::new(std::mem::take(&mut self.pace));
    }

    /// What to do next. `asked`: somebody waits for pages.
    pub fn next(&mut self, now: Duration, asked: bool) -> NextMissing {
        let delay = self.pace.delay(now);
        match () {
            () if asked => NextMissing::Requested,
            () if delay > Duration::ZERO => NextMissing::Pause(delay),
            () if self.sent - self.read >= self.room => {
                self.answers.full = true;
                NextMissing::Full
            }
            () => NextMissing::Background,
        }
    }

    /// Pages that somebody waits for, or not, have left, of whatever kind: one that is zero takes the peer about as long as
    /// another.
    pub fn sent(&mut self, now: Duration, pages: u64, bytes: u64, asked: bool) {
        if !asked {
            self.pace.charge(now, bytes);
        }
        self.sent += pages;
    }

    /// The value of the PING that is to follow now; `None` while none is due.
    pub fn mark(&mut self, now: Duration) -> Option<u32> {
        let last = self.marks.back().map_or(self.read, |mark| mark.behind);
        if self.sent - last < PIECE {
            return None;
        }
        let value = MARK | u32::from(self.number);
        self.number = self.number.wrapping_add(1);
        self.marks.push_back(Mark { value, behind: self.sent, sent_at: now });
        Some(value)
    }

    /// The peer has answered a PING of this value, which need not be a mark.
    pub fn answered(&mut self, now: Duration, value: u32) {
        let Some(at) = self.marks.iter().position(|mark| mark.value == value) else { return };
        let Some(mark) = self.marks.drain(..=at).next_back() else { return };
        self.read = mark.behind;
        let took = now.saturating_sub(mark.sent_at);
        let faster = |known: Option<Duration>| Some(known.map_or(took, |known| known.min(took)));
        self.fastest = faster(self.fastest);
        self.answers.fastest = faster(self.answers.fastest);
        self.answers.count += 1;
        // Once that what left with the present room has been read.
        if self.answers.count >= ANSWERS && self.read > self.answers.since {
            let next = Answers { since: self.sent, ..Answers::default() };
            let answers = std::mem::replace(&mut self.answers, next);
            self.change_room(answers);
        }
    }

    fn change_room(&mut self, answers: Answers) {
        let (Some(ever), Some(now)) = (self.fastest, answers.fastest) else { return };
        let queue = now.saturating_sub(ever);
        if queue > LONG_QUEUE {
            self.starting = false;
            self.room = (self.room - self.room / 8).max(FIRST_ROOM);
        } else if queue < SHORT_QUEUE && answers.full {
            let more = if self.starting { self.room } else { PIECE };
            self.room = (self.room + more).min(MAX_ROOM);
        }
    }
}

/// True if a PING of this value is a mark.
#[cfg(test)]
pub(crate) fn is_mark(value: u32) -> bool {
    value & 0xffff_0000 == MARK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::BandwidthLimit;

    fn background(limit: u64) -> Background {
        Background::new(Pace::new(BandwidthLimit::new(limit)))
    }

    /// Pages that are sent at a time.
    const BATCH: u64 = 16;

    /// A connection that takes `there` each way, to a peer that takes `page` to place one: how long the last page of a second
    /// waited behind others, and pages a second.
    fn run(there: Duration, page: Duration) -> (Duration, u64) {
        let mut background = background(0);
        let (mut now, end) = (Duration::ZERO, Duration::from_secs(4));
        let (mut free_at, mut placed, mut queue) = (Duration::ZERO, 0, Duration::ZERO);
        let mut answers: VecDeque<(Duration, u32)> = VecDeque::new();
        while now < end {
            while let Some((at, value)) = answers.front().copied().filter(|(at, _)| *at <= now) {
                answers.pop_front();
                background.answered(at, value);
            }
            if background.next(now, false) == NextMissing::Full {
                now = answers.front().map_or(end, |(at, _)| *at);
                continue;
            }
            free_at = free_at.max(now + there);
            queue = free_at - (now + there);
            free_at += page * BATCH as u32;
            placed += u64::from(now >= end / 2) * BATCH;
            background.sent(now, BATCH, 0, false);
            if let Some(value) = background.mark(now) {
                answers.push_back((free_at + there, value));
            }
            // To hand a piece to the kernel.
            now += Duration::from_micros(10);
        }
        (queue, placed * 2 / end.as_secs())
    }

    /// Whatever the connection is, what is under way keeps the peer busy and is no more than that.
    #[test]
    fn the_peer_is_kept_busy_and_a_page_waits_for_less_than_a_millisecond() {
        for (there, page) in [(5, 1), (5, 4), (50, 3), (500, 4), (5000, 8), (20_000, 4), (5, 400)] {
            let (there, page) = (Duration::from_micros(there), Duration::from_micros(page));
            let (queue, rate) = run(there, page);
            let most = (page * FIRST_ROOM as u32).max(Duration::from_millis(1));
            assert!(queue <= most, "{there:?}, {page:?} a page: {queue:?} of queue");
            let able = 1_000_000 / page.as_micros() as u64;
            assert!(rate * 10 >= able * 9, "{there:?}, {page:?} a page: {rate} of {able} pages a second");
        }
    }

    #[test]
    fn a_request_waits_for_nothing_and_the_rest_for_room() {
        let (mut background, now) = (background(0), Duration::from_millis(1));
        assert_eq!(background.next(now, false), NextMissing::Background);
        background.sent(now, FIRST_ROOM, 0, false);
        let mark = background.mark(now);
        assert_eq!((mark, background.mark(now)), (Some(MARK), None), "once behind the same pages");
        assert_eq!(background.next(now, false), NextMissing::Full);
        assert_eq!(background.next(now, true), NextMissing::Requested);
        background.answered(now, 4);
        assert_eq!(background.next(now, false), NextMissing::Full, "another PING");
        background.answered(now, MARK);
        assert_eq!(background.next(now, false), NextMissing::Background);
        background.answered(now, MARK);
        assert_eq!(background.sent - background.read, 0, "twice is once");
    }

    /// Pages that somebody waits for leave whatever the limit is, and take nothing of it from the others.
    #[test]
    fn requests_do_not_count_against_the_limit() {
        let (mut background, now) = (background(1_000_000), Duration::from_secs(1));
        background.sent(now, 1, 1_000_000, true);
        assert_eq!(background.next(now, false), NextMissing::Background);
        background.sent(now, 1, 10_000, false);
        let NextMissing::Pause(delay) = background.next(now, false) else { panic!("there is a limit") };
        assert!(delay > Duration::from_millis(5) && delay <= Duration::from_millis(10), "{delay:?}");
        background.sent(now, 1, 1_000_000, true);
        assert_eq!(
            (background.next(now, true), background.next(now, false)),
            (NextMissing::Requested, NextMissing::Pause(delay))
        );
        background.forget_connection();
        assert_eq!(background.next(now, false), NextMissing::Pause(delay), "on any connection");
    }

    #[test]
    fn one_late_answer_of_many_changes_nothing() {
        const ROOM: u64 = 1 << 10;
        let mut background = Background { room: ROOM, ..background(0) };
        let mut now = Duration::ZERO;
        for count in 0..8000 {
            background.sent(now, PIECE, 0, false);
            let Some(mark) = background.mark(now) else { continue };
            now += Duration::from_micros(if count % 3 == 0 { 40_000 } else { 50 });
            background.answered(now, mark);
            assert_eq!(background.room, ROOM, "there was always room, and no queue");
        }
    }
}
