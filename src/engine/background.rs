//! How far ahead of its peer a source in postcopy is with background pages.
//!
//! A requested page waits for all earlier bytes on the same connection: in this host's queue, on the wire, and in the
//! peer's queue, which alone may hold megabytes that are not placed yet. So the source sends marks (PING) between the
//! pages, and the peer answers each mark when it reads it. Pages after the last answered mark are in flight; only as
//! many may be in flight as keep the connection busy. While there is no room, the source reads the peer's messages: no
//! blocking send keeps it from reading a request.
//!
//! The room follows the time in which marks are answered. A mark that is answered later than the fastest one has waited
//! in a queue. Of several answers the fastest counts, since one late answer may come from a thread that was not
//! scheduled.

use std::collections::VecDeque;
use std::time::Duration;

use super::Pace;

/// Target pages that may be in flight at first; this is also the minimum.
pub(crate) const FIRST_ROOM: u64 = 64;
/// The maximum: 64 MiB of ordinary pages, which 10 Gbit/s carry in 50 ms.
const MAX_ROOM: u64 = 16 << 10;
/// Minimum number of pages between two marks, and the step by which the room grows. It is constant: the pages before a
/// mark alone are no queue.
const PIECE: u64 = 32;
/// Minimum number of answers before the room may change.
const ANSWERS: u32 = 8;
/// With a shorter queue than this the room grows, with a longer one than the next it shrinks.
const SHORT_QUEUE: Duration = Duration::from_micros(100);
const LONG_QUEUE: Duration = Duration::from_micros(200);
/// Marks are PINGs with these values, whose low bits count. No PING of QEMU has such a value, and none of a ramwire's
/// greeting.
const MARK: u32 = 0x5250_0000;

/// What a source in postcopy does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextMissing {
    /// Sends requested pages.
    Requested,
    /// Sends background pages.
    Background,
    /// Waits for this long because of the bandwidth limit, or until a request.
    Pause(Duration),
    /// Waits for the peer's next message.
    Full,
    /// Gives background pages to a page channel.
    Spread,
    /// Waits until a page channel has room.
    Crowded,
}

/// A PING between pages.
#[derive(Clone, Copy, Debug)]
struct Mark {
    value: u32,
    /// Pages sent before the mark, since the beginning.
    behind: u64,
    sent_at: Duration,
}

/// Answers since the room was last changed.
#[derive(Clone, Copy, Debug, Default)]
struct Answers {
    count: u32,
    /// Pages that had been sent at that time.
    since: u64,
    fastest: Option<Duration>,
    /// There was no room meanwhile.
    full: bool,
}

/// The pages in flight on one connection, and how fast background pages may be sent.
#[derive(Debug)]
pub struct Background {
    pace: Pace,
    room: u64,
    /// Pages that were sent, and how many of them the peer has read.
    sent: u64,
    read: u64,
    marks: VecDeque<Mark>,
    number: u16,
    /// The fastest answer of all.
    fastest: Option<Duration>,
    answers: Answers,
    /// No queue has been long yet: the room still doubles.
    starting: bool,
    /// The peer has read the package, and serves faults.
    serves: bool,
}

impl Background {
    /// Nothing sent yet. `pace` limits background pages.
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
            serves: false,
        }
    }

    /// Another connection follows. The bandwidth limit continues.
    pub fn forget_connection(&mut self) {
        *self = Self::new(std::mem::take(&mut self.pace));
    }

    /// The peer has answered the mark behind the package: from here on it places what comes on page channels as missing
    /// pages.
    pub fn serves(&mut self) {
        self.serves = true;
    }

    /// What to do next. `asked`: there are requested pages. `channels`: background pages go on page channels, and one of
    /// them has room or none. They then wait for no mark, since requested pages have another connection.
    pub fn next(&mut self, now: Duration, asked: bool, channels: Option<bool>) -> NextMissing {
        let delay = self.pace.delay(now);
        match () {
            () if asked => NextMissing::Requested,
            () if delay > Duration::ZERO => NextMissing::Pause(delay),
            () if channels.is_some() && !self.serves => NextMissing::Full,
            () if channels == Some(false) => NextMissing::Crowded,
            () if channels == Some(true) => NextMissing::Spread,
            () if self.sent - self.read >= self.room => {
                self.answers.full = true;
                NextMissing::Full
            }
            () => NextMissing::Background,
        }
    }

    /// Requested or background pages have been sent, of any kind: the peer takes about as long for a zero page as for
    /// another.
    pub fn sent(&mut self, now: Duration, pages: u64, bytes: u64, asked: bool) {
        if !asked {
            self.pace.charge(now, bytes);
        }
        self.sent += pages;
    }

    /// Background pages have been given to a page channel.
    pub fn sent_aside(&mut self, now: Duration, bytes: u64) {
        self.pace.charge(now, bytes);
    }

    /// The value of the PING to send now; `None` while none is due.
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

    /// The peer has answered a PING with this value, which need not be a mark.
    pub fn answered(&mut self, now: Duration, value: u32) {
        let Some(at) = self.marks.iter().position(|mark| mark.value == value) else { return };
        let Some(mark) = self.marks.drain(..=at).next_back() else { return };
        self.read = mark.behind;
        let took = now.saturating_sub(mark.sent_at);
        let faster = |known: Option<Duration>| Some(known.map_or(took, |known| known.min(took)));
        self.fastest = faster(self.fastest);
        self.answers.fastest = faster(self.answers.fastest);
        self.answers.count += 1;
        // Only after the peer has read the pages that were sent with the present room.
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

    /// Pages per batch.
    const BATCH: u64 = 16;

    /// A connection with a delay of `there` each way, to a peer that takes `page` to place one page: how long the last
    /// page of a second waited in queues, and pages a second.
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
            if background.next(now, false, None) == NextMissing::Full {
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
            // Time to pass a piece to the kernel.
            now += Duration::from_micros(10);
        }
        (queue, placed * 2 / end.as_secs())
    }

    /// For any connection, the pages in flight keep the peer busy and are no more than needed for that.
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
        assert_eq!(background.next(now, false, None), NextMissing::Background);
        background.sent(now, FIRST_ROOM, 0, false);
        let mark = background.mark(now);
        assert_eq!((mark, background.mark(now)), (Some(MARK), None), "once behind the same pages");
        assert_eq!(background.next(now, false, None), NextMissing::Full);
        assert_eq!(background.next(now, true, None), NextMissing::Requested);
        background.answered(now, 4);
        assert_eq!(background.next(now, false, None), NextMissing::Full, "another PING");
        background.answered(now, MARK);
        assert_eq!(background.next(now, false, None), NextMissing::Background);
        background.answered(now, MARK);
        assert_eq!(background.sent - background.read, 0, "twice is once");
    }

    /// Requested pages are sent whatever the limit is, and do not count against the limit of background pages.
    #[test]
    fn requests_do_not_count_against_the_limit() {
        let (mut background, now) = (background(1_000_000), Duration::from_secs(1));
        background.sent(now, 1, 1_000_000, true);
        assert_eq!(background.next(now, false, None), NextMissing::Background);
        background.sent(now, 1, 10_000, false);
        let NextMissing::Pause(delay) = background.next(now, false, None) else { panic!("there is a limit") };
        assert!(delay > Duration::from_millis(5) && delay <= Duration::from_millis(10), "{delay:?}");
        background.sent(now, 1, 1_000_000, true);
        assert_eq!(
            (background.next(now, true, None), background.next(now, false, None)),
            (NextMissing::Requested, NextMissing::Pause(delay))
        );
        background.forget_connection();
        assert_eq!(background.next(now, false, None), NextMissing::Pause(delay), "on any connection");
    }

    #[test]
    fn page_channels_carry_nothing_before_the_peer_serves_faults_and_wait_for_no_mark() {
        let (mut background, now) = (background(0), Duration::ZERO);
        assert_eq!(background.next(now, false, Some(true)), NextMissing::Full);
        assert_eq!(background.next(now, true, Some(true)), NextMissing::Requested);
        background.serves();
        background.sent(now, 10 * FIRST_ROOM, 1, true);
        assert_eq!(background.next(now, false, Some(true)), NextMissing::Spread);
        assert_eq!(background.next(now, false, Some(false)), NextMissing::Crowded);
        assert_eq!(background.next(now, true, Some(false)), NextMissing::Requested);
        assert_eq!(background.next(now, false, None), NextMissing::Full, "on the main connection");
        background.forget_connection();
        assert_eq!(background.next(now, false, Some(true)), NextMissing::Full);
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
