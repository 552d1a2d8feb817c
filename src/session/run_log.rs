//! The log of a run, written by a thread of its own: rounds and changes of state as they happen, samples in between.

use std::io::{self, BufWriter, Write};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use crossbeam::channel::{Receiver, Sender, bounded, select_biased};

use crate::observe::{Event, Events, Record, Recorder, RunDescription, SharedStatistics};

use crate::session::Error;
use crate::session::workers::Spawner;

/// Writes lines of JSON, as docs/run-log.md describes them, while a migration runs. A failure to write the log never
/// affects the migration.
#[derive(Debug)]
pub struct RunLog {
    /// Dropped to end the thread.
    ends: Option<Sender<()>>,
    result: Receiver<io::Result<()>>,
    thread: Option<JoinHandle<()>>,
}

impl RunLog {
    /// Interval between samples that gives charts a time axis.
    pub const EVERY: Duration = Duration::from_millis(100);

    /// Starts to log a migration that has not begun yet, on a thread `ramwire-log`. A line is written to `out`
    /// immediately, alone or with others that are due.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub fn start(
        statistics: SharedStatistics,
        run: RunDescription,
        out: Box<dyn Write + Send>,
        spawner: &Spawner,
    ) -> Result<Self, Error> {
        let events = statistics.events();
        let (ends, ended) = bounded(0);
        let (give, result) = bounded(1);
        let began = Instant::now();
        let mut follower = Follower {
            statistics,
            events,
            ended,
            began,
            recorder: Recorder::default(),
            out: BufWriter::new(out),
        };
        let job = move || {
            // Without a receiver the result is not needed.
            let _ = give.send(follower.follow(run));
        };
        let thread = Some(spawner.spawn("ramwire-log", Box::new(job))?);
        Ok(Self { ends: Some(ends), result, thread })
    }

    /// Waits until all events so far are written.
    ///
    /// # Errors
    /// What ended the writing early.
    pub fn finish(mut self) -> io::Result<()> {
        self.end();
        self.result.recv().unwrap_or_else(|_| Err(io::Error::other("the log's thread died")))
    }

    fn end(&mut self) {
        drop(self.ends.take());
        if let Some(thread) = self.thread.take() {
            // If it panicked its result is missing, which is reported.
            let _ = thread.join();
        }
    }
}

impl Drop for RunLog {
    fn drop(&mut self) {
        self.end();
    }
}

struct Follower {
    statistics: SharedStatistics,
    events: Events,
    ended: Receiver<()>,
    began: Instant,
    recorder: Recorder,
    out: BufWriter<Box<dyn Write + Send>>,
}

impl Follower {
    /// Runs until the migration's end is written or the log is closed.
    fn follow(&mut self, run: RunDescription) -> io::Result<()> {
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let first = self.recorder.run(run, since_1970);
        self.write(&first)?;
        let mut next = self.began;
        loop {
            if self.events.queue().is_empty() {
                self.out.flush()?;
            }
            let wait = crossbeam::channel::at(next);
            // Biased: an event is written before a sample that was taken after it.
            select_biased! {
                recv(self.events.queue()) -> event => match event {
                    Ok(event) if self.take(&event)? => return self.out.flush(),
                    Ok(_) => {}
                    // Its thread died without a last event.
                    Err(_) => return self.out.flush(),
                },
                recv(self.ended) -> _ => return self.write_end(),
                recv(wait) -> _ => {
                    let now = self.statistics.snapshot();
                    let sample = self.recorder.sample(self.began.elapsed(), &now);
                    self.write(&sample)?;
                    next = (next + RunLog::EVERY).max(Instant::now());
                }
            }
        }
    }

    /// Events from before the log was ended.
    fn write_end(&mut self) -> io::Result<()> {
        while let Ok(event) = self.events.try_recv() {
            if self.take(&event)? {
                break;
            }
        }
        self.out.flush()
    }

    /// Writes an event; true if it was the last.
    fn take(&mut self, event: &Event) -> io::Result<bool> {
        let at = event.at.saturating_duration_since(self.began);
        if let Some(record) = self.recorder.event(at, &event.kind) {
            self.write(&record)?;
        }
        if event.kind.is_last() {
            let end = self.recorder.end(at, &self.statistics.snapshot());
            self.write(&end)?;
        }
        Ok(event.kind.is_last())
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, record)?;
        self.out.write_all(b"\n")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::observe::{RoundReport, Status};

    #[derive(Clone, Default)]
    struct Text(Arc<Mutex<Vec<u8>>>);

    impl Write for Text {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn start(out: impl Write + Send + 'static) -> (SharedStatistics, RunLog) {
        let statistics = SharedStatistics::default();
        let run = RunDescription { page_bytes: 4096, ..RunDescription::default() };
        let log = RunLog::start(statistics.clone(), run, Box::new(out), &Spawner::default()).unwrap();
        (statistics, log)
    }

    fn records(text: &Text) -> Vec<Record> {
        let text = text.0.lock().unwrap();
        let lines = std::str::from_utf8(&text).unwrap().lines();
        lines.map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn rounds_and_states_are_lines_in_order_and_the_end_is_the_last() {
        let text = Text::default();
        let (statistics, log) = start(text.clone());
        statistics.update(|s| s.status = Status::Active);
        statistics.update(|s| s.push_round(RoundReport { round: 1, ..RoundReport::default() }));
        while !records(&text).iter().any(|record| matches!(record, Record::Round { .. })) {
            std::thread::yield_now();
        }
        statistics.update(|s| (s.status, s.ended, s.transferred) = (Status::Completed, true, 77));
        log.finish().unwrap();
        let found = records(&text);
        assert!(matches!(found[0], Record::Run { .. }));
        assert!(matches!(found.last().unwrap(), Record::End(end) if end.transferred == 77));
        let told: Vec<_> = found
            .iter()
            .filter_map(|record| match record {
                Record::Event { event, .. } => Some(event.as_str()),
                Record::Round { .. } => Some("round"),
                _ => None,
            })
            .collect();
        assert_eq!(told, ["active", "round", "completed"]);
        let at = |record: &Record| match record {
            Record::Run { .. } => 0.0,
            Record::Sample(sample) => sample.at_ms,
            Record::Round { at_ms, .. } | Record::Event { at_ms, .. } => *at_ms,
            Record::End(end) => end.at_ms,
        };
        assert!(found.iter().any(|record| matches!(record, Record::Sample(_))));
        assert!(found.iter().all(|record| at(record).is_finite()));
    }

    #[test]
    fn a_log_without_an_end_stays_without_one_and_its_thread_ends() {
        let text = Text::default();
        let (statistics, log) = start(text.clone());
        statistics.update(|s| s.status = Status::Active);
        log.finish().unwrap();
        assert!(matches!(records(&text).last().unwrap(), Record::Event { event, .. } if event == "active"));
    }

    #[test]
    fn a_full_disk_ends_the_log_and_nothing_else() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (statistics, log) = start(Full);
        for round in 1..100 {
            statistics.update(|s| s.push_round(RoundReport { round, ..RoundReport::default() }));
        }
        statistics.update(|s| s.ended = true);
        assert_eq!(log.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
