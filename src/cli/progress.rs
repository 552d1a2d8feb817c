//! A progress line on a terminal, otherwise no output; and the status line of a service.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use indicatif::{ProgressBar, ProgressStyle};
use ramwire::observe::{SharedStatistics, Statistics};

use super::service::StatusLine;

/// Interval between two drawings of the line.
const TICK: Duration = Duration::from_millis(100);

/// How long the last drawing may take.
const LAST_DRAWING: Duration = Duration::from_secs(1);

/// Draws until it is dropped.
pub(super) struct Progress {
    done: Arc<AtomicBool>,
    /// Disconnected when the thread ends.
    ended: Option<Receiver<()>>,
    _service: StatusLine,
}

impl Progress {
    /// Follows a source's `statistics` if standard error is a terminal.
    pub(super) fn follow(statistics: SharedStatistics) -> Self {
        Self::draw(statistics, |now| format!("round {}  {}", now.round_count() + 1, line(now)))
    }

    /// Follows a destination's figures, which have no rounds.
    pub(super) fn follow_destination(statistics: SharedStatistics) -> Self {
        Self::draw(statistics, line)
    }

    fn draw(statistics: SharedStatistics, line: impl Fn(&Statistics) -> String + Send + 'static) -> Self {
        let service = StatusLine::follow(statistics.clone());
        let done = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&done);
        let (ending, ended) = bounded(0);
        let ending: Sender<()> = ending;
        let draw = move || {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            while !stop.load(Ordering::Acquire) {
                let now = statistics.snapshot();
                // A total of zero would count as complete: a total that is not known yet is not zero.
                bar.set_length(now.total.max(1));
                bar.set_position(now.total.saturating_sub(now.remaining));
                bar.set_message(line(&now));
                std::thread::sleep(TICK);
            }
            bar.finish_and_clear();
            drop(ending);
        };
        let wanted = std::io::stderr().is_terminal();
        let thread = wanted.then(|| std::thread::Builder::new().name("ramwire-draws".into()).spawn(draw));
        Self { done, ended: thread.and_then(Result::ok).map(|_| ended), _service: service }
    }
}

impl Drop for Progress {
    /// A stopped terminal delays the line, but not the migration's end.
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(ended) = self.ended.take() {
            let _ = ended.recv_timeout(LAST_DRAWING);
        }
    }
}

/// `1.2 GB/s  40 MB left  ETA 0.1 s`.
fn line(now: &Statistics) -> String {
    let eta = now.remaining as f64 / now.throughput.max(1) as f64;
    let eta = if now.throughput == 0 { "?".into() } else { format!("{eta:.1} s") };
    format!(
        "{}/s  {} left  ETA {eta}",
        super::common::human_bytes(now.throughput),
        super::common::human_bytes(now.remaining),
    )
}
