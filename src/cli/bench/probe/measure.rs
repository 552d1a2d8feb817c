//! The loops of a measurement, for any transport of its messages.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ramwire::sys::CancelToken;

use super::super::BenchError;
use super::record::Recorded;

/// Messages that are answered.
pub trait Echo {
    /// Sends a message and waits for its answer.
    ///
    /// # Errors
    /// [`BenchError`], also if the other end is silent.
    fn exchange(&mut self) -> Result<(), BenchError>;
}

/// Requests that complete in order.
pub trait Flow {
    /// Begins one.
    ///
    /// # Errors
    /// [`BenchError`].
    fn post(&mut self) -> Result<(), BenchError>;

    /// How many more requests have completed; does not wait.
    ///
    /// # Errors
    /// [`BenchError`].
    fn completed(&mut self) -> Result<usize, BenchError>;

    /// Waits until all posted requests have arrived at the other end; this takes a while if only the other end can
    /// confirm it.
    ///
    /// # Errors
    /// [`BenchError`].
    fn settle(&mut self) -> Result<(), BenchError> {
        Ok(())
    }
}

/// How long and how fast.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// How long.
    pub duration: Duration,
    /// Time from the start of one message to the start of the next; `None`: as soon as possible.
    pub every: Option<Duration>,
}

impl Pace {
    /// When message `number` should start, from the start of the measurement.
    fn due(&self, number: u32) -> Option<Duration> {
        self.every.map(|every| every * number)
    }
}

/// Waits until `due` after `start`; spins at the end, since a sleep wakes up late.
fn wait_until(start: Instant, due: Duration) {
    const SPIN: Duration = Duration::from_micros(200);
    if let Some(left) = due.checked_sub(start.elapsed()).and_then(|left| left.checked_sub(SPIN)) {
        std::thread::sleep(left);
    }
    while start.elapsed() < due {
        std::hint::spin_loop();
    }
}

/// Half the round trips of `echo`, one after the other. The first ones are not counted.
///
/// # Errors
/// [`BenchError`].
pub fn echoes(echo: &mut dyn Echo, pace: Pace, cancel: &CancelToken) -> Result<Recorded, BenchError> {
    const WARM_UP: u32 = 20;
    for _ in 0..WARM_UP {
        echo.exchange()?;
    }
    let mut recorded = Recorded::new(pace.every.is_some());
    let start = Instant::now();
    for number in 0.. {
        let due = pace.due(number);
        if due.unwrap_or_else(|| start.elapsed()) >= pace.duration {
            break;
        }
        if cancel.is_cancelled() {
            return Err(BenchError::Cancelled);
        }
        if let Some(due) = due {
            wait_until(start, due);
        }
        let begun = start.elapsed();
        echo.exchange()?;
        let ended = start.elapsed();
        let late = due.map_or(Duration::ZERO, |due| begun.saturating_sub(due));
        recorded.record(ended, (ended - begun) / 2, late);
    }
    Ok(recorded)
}

/// Requests of `flow` from begin to completion, at most `depth` at a time.
///
/// # Errors
/// [`BenchError`].
pub fn requests(
    flow: &mut dyn Flow,
    depth: usize,
    pace: Pace,
    cancel: &CancelToken,
) -> Result<Recorded, BenchError> {
    let mut recorded = Recorded::new(pace.every.is_some());
    let mut out: VecDeque<(Duration, Duration)> = VecDeque::with_capacity(depth);
    let start = Instant::now();
    let mut number = 0u32;
    let mut answered = Duration::ZERO;
    loop {
        let due = pace.due(number);
        let now = start.elapsed();
        let more = due.unwrap_or(now) < pace.duration && !cancel.is_cancelled();
        if more && out.len() < depth && due.is_none_or(|due| now >= due) {
            flow.post()?;
            out.push_back((now, due.map_or(Duration::ZERO, |due| now.saturating_sub(due))));
            number += 1;
        }
        if out.is_empty() && !more {
            break;
        }
        let completed = flow.completed()?;
        let ended = start.elapsed();
        if completed > 0 || out.is_empty() {
            answered = ended;
        } else if ended - answered > super::messages::ANSWER_TIMEOUT {
            return Err(silent());
        }
        for (begun, late) in out.drain(..completed.min(out.len())) {
            recorded.record(ended, ended - begun, late);
        }
    }
    flow.settle()?;
    recorded.length = start.elapsed();
    if cancel.is_cancelled() { Err(BenchError::Cancelled) } else { Ok(recorded) }
}

/// Nothing arrived for too long.
pub fn silent() -> BenchError {
    super::messages::failed("waiting for the other end")(std::io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Completes two requests at a time.
    #[derive(Default)]
    struct Pairs {
        out: usize,
        most: usize,
        posted: u64,
    }

    impl Flow for Pairs {
        fn post(&mut self) -> Result<(), BenchError> {
            self.out += 1;
            self.posted += 1;
            self.most = self.most.max(self.out);
            Ok(())
        }

        fn completed(&mut self) -> Result<usize, BenchError> {
            let done = if self.out >= 2 { 2 } else { 0 };
            self.out -= done;
            // The last one completes alone.
            if done == 0 && self.most >= 2 { Ok(std::mem::take(&mut self.out)) } else { Ok(done) }
        }
    }

    impl Echo for Pairs {
        fn exchange(&mut self) -> Result<(), BenchError> {
            self.posted += 1;
            Ok(())
        }
    }

    #[test]
    fn every_request_is_recorded_once_and_no_more_are_out_than_allowed() {
        let cancel = CancelToken::default();
        let mut flow = Pairs::default();
        let pace = Pace { duration: Duration::from_millis(5), every: None };
        let recorded = requests(&mut flow, 2, pace, &cancel).unwrap();
        assert_eq!(recorded.uncorrected.len(), flow.posted);
        assert!(flow.most == 2 && recorded.corrected.is_none());
    }

    #[test]
    fn a_rate_gives_as_many_messages_as_it_says() {
        let cancel = CancelToken::default();
        let mut echo = Pairs::default();
        let pace = Pace { duration: Duration::from_millis(20), every: Some(Duration::from_millis(1)) };
        let recorded = echoes(&mut echo, pace, &cancel).unwrap();
        assert_eq!((recorded.uncorrected.len(), recorded.corrected.unwrap().len()), (20, 20));
        cancel.cancel();
        assert!(matches!(echoes(&mut echo, pace, &cancel), Err(BenchError::Cancelled)));
    }
}
