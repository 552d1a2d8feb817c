//! A progress line on a terminal, nothing anywhere else.

use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use ramwire::observe::{SharedStatistics, Statistics};

/// How often the line is drawn.
const TICK: Duration = Duration::from_millis(100);

/// Draws until it is dropped.
pub(super) struct Progress {
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Progress {
    /// Follows `statistics` if standard error is a terminal.
    pub(super) fn follow(statistics: SharedStatistics) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&done);
        let draw = move || {
            let bar = ProgressBar::new(0);
            let style = ProgressStyle::with_template("{bar:24} {percent:>3}%  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            while !stop.load(Ordering::Acquire) {
                let now = statistics.snapshot();
                bar.set_length(now.total);
                bar.set_position(now.total.saturating_sub(now.remaining));
                bar.set_message(line(&now));
                std::thread::sleep(TICK);
            }
            bar.finish_and_clear();
        };
        let wanted = std::io::stderr().is_terminal();
        let thread = wanted.then(|| std::thread::Builder::new().name("ramwire-progress".into()).spawn(draw));
        Self { done, thread: thread.and_then(Result::ok) }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `round 3  1.2 GB/s  40 MB left  ETA 0.1 s`.
fn line(now: &Statistics) -> String {
    let eta = now.remaining as f64 / now.throughput.max(1) as f64;
    let eta = if now.throughput == 0 { "?".into() } else { format!("{eta:.1} s") };
    format!(
        "round {}  {}/s  {} left  ETA {eta}",
        now.round_count() + 1,
        super::common::human_bytes(now.throughput),
        super::common::human_bytes(now.remaining),
    )
}
