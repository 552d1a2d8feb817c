//! All output of the command.
//!
//! A failure of the output never affects a guest: nothing here panics, fails, or delays a migration.
//!
//! Notes, errors and logs go to standard error through a queue and a thread, so that a stopped terminal or an unread
//! pipe blocks only that thread. Lines that do not fit the queue are dropped and counted. Results go to standard output
//! once the outcome is final, and wait for their reader like those of any program.
//!
//! If standard error is the journal's, each line begins with its priority (sd-daemon(3)), and logs have no time of their
//! own.

use std::fmt::Arguments;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

use super::args::Exit;

/// Maximum number of bytes that wait for standard error.
const MAX_WAITING: usize = 16 << 20;

/// How long the end of the command waits until standard error has accepted the last lines.
const LAST_LINES: Duration = Duration::from_secs(2);

/// Priorities of lines in the journal, as of syslog(3).
pub(super) mod priority {
    /// It failed.
    pub const ERROR: u8 = 3;
    /// It may fail.
    pub const WARNING: u8 = 4;
    /// What an operator should know.
    pub const NOTICE: u8 = 5;
    /// What goes on.
    pub const INFO: u8 = 6;
    /// For developers.
    pub const DEBUG: u8 = 7;
}

/// A line to standard error.
macro_rules! note {
    ($($text:tt)*) => { $crate::cli::output::note_line($crate::cli::output::priority::NOTICE, ::std::format_args!($($text)*)) };
}
pub(super) use note;

/// Writes a line of the result to standard output.
macro_rules! result_line {
    ($($text:tt)*) => { $crate::cli::output::result(::std::format_args!("{}\n", ::std::format_args!($($text)*))) };
}
pub(super) use result_line;

/// Writes the result's text to standard output, unchanged.
macro_rules! result_text {
    ($($text:tt)*) => { $crate::cli::output::result(::std::format_args!($($text)*)) };
}
pub(super) use result_text;

enum Order {
    Write(Vec<u8>),
    /// Answer once everything before this is written.
    Answer(Sender<()>),
}

/// The queue in front of a stream.
struct Queue {
    orders: Sender<Order>,
    waiting: Arc<AtomicUsize>,
    left_out: AtomicU64,
}

impl Queue {
    /// A queue whose thread writes to `out`; `None` if no thread can be started.
    fn start(out: impl Write + Send + 'static) -> Option<Self> {
        let (orders, taken) = unbounded();
        let waiting = Arc::new(AtomicUsize::new(0));
        let written = Arc::clone(&waiting);
        let thread = std::thread::Builder::new().name("ramwire-output".into());
        thread.spawn(move || write_all(&taken, &written, out)).ok()?;
        Some(Self { orders, waiting, left_out: AtomicU64::new(0) })
    }

    /// Puts `text` into the queue, or drops it if too much waits. Never blocks.
    fn put(&self, text: &[u8]) {
        if self.waiting.load(Ordering::Acquire) + text.len() > MAX_WAITING {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let missing = self.left_out.swap(0, Ordering::Relaxed);
        let mut line = Vec::new();
        if missing > 0 {
            // Writing to memory does not fail.
            let _ = writeln!(line, "ramwire: {missing} lines were left out: standard error was not read");
        }
        line.extend_from_slice(text);
        self.waiting.fetch_add(line.len(), Ordering::AcqRel);
        // Its thread ends only with the process.
        let _ = self.orders.send(Order::Write(line));
    }

    /// Waits until everything in the queue is written, at most `time`.
    fn flush(&self, time: Duration) {
        let (done, written) = bounded(1);
        if self.orders.send(Order::Answer(done)).is_ok() {
            let _ = written.recv_timeout(time);
        }
    }
}

fn write_all(orders: &Receiver<Order>, waiting: &AtomicUsize, mut out: impl Write) {
    for order in orders {
        match order {
            Order::Write(text) => {
                // There is no place left to report a failure of standard error to.
                let _ = out.write_all(&text).and_then(|()| out.flush());
                waiting.fetch_sub(text.len(), Ordering::AcqRel);
            }
            Order::Answer(done) => drop(done.send(())),
        }
    }
}

/// The queue of standard error; `None` if no thread can be started: then each line is written immediately.
fn errors() -> Option<&'static Queue> {
    static ERRORS: OnceLock<Option<Queue>> = OnceLock::new();
    ERRORS.get_or_init(|| Queue::start(io::stderr())).as_ref()
}

fn put(text: &[u8]) {
    match errors() {
        Some(queue) => queue.put(text),
        None => drop(io::stderr().write_all(text)),
    }
}

/// See [`note!`].
pub(super) fn note_line(priority: u8, text: Arguments<'_>) {
    put_lines(priority, &format!("{text}\n"));
}

fn put_lines(priority: u8, text: &str) {
    if is_journal() { put(prefixed(priority, text).as_bytes()) } else { put(text.as_bytes()) }
}

/// Each line with its priority.
fn prefixed(priority: u8, text: &str) -> String {
    text.lines().map(|line| format!("<{priority}>{line}\n")).collect()
}

/// True if standard error is the journal's (systemd.exec(5), JOURNAL_STREAM).
pub(super) fn is_journal() -> bool {
    static JOURNAL: OnceLock<bool> = OnceLock::new();
    *JOURNAL.get_or_init(|| {
        let here = rustix::fs::fstat(io::stderr()).map(|stat| format!("{}:{}", stat.st_dev, stat.st_ino));
        std::env::var("JOURNAL_STREAM").is_ok_and(|journal| here.is_ok_and(|here| here == journal))
    })
}

/// Notes what goes wrong again and again: once, and again only after something else or a success.
#[derive(Debug, Default)]
pub(super) struct Repeated(Option<String>);

impl Repeated {
    /// It has gone wrong; true if it is noted.
    pub(super) fn note(&mut self, text: String) -> bool {
        if self.0.as_ref() == Some(&text) {
            return false;
        }
        note!("{text}");
        self.0 = Some(text);
        true
    }

    /// It went well.
    pub(super) fn passed(&mut self) {
        self.0 = None;
    }
}

/// Prints a result to standard output. A failure is noted on standard error, and changes no exit status.
pub(super) fn result(text: Arguments<'_>) {
    if let Err(error) = product(text.to_string().as_bytes())
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        note!("ramwire: standard output: {error}; the outcome is in the exit status only");
    }
}

/// Prints the product of a command, such as completions: without it the command has failed.
///
/// # Errors
/// The error of the write.
pub(super) fn product(text: &[u8]) -> io::Result<()> {
    // On a terminal, earlier notes come before it.
    flush();
    let mut out = io::stdout().lock();
    out.write_all(text)?;
    out.flush()
}

/// Waits briefly until standard error has accepted the notes.
pub(super) fn flush() {
    if let Some(queue) = errors() {
        queue.flush(LAST_LINES);
    }
}

/// The process's status, after standard error has had time to accept the last lines.
pub(super) fn status(exit: Exit) -> ExitCode {
    flush();
    exit.into()
}

/// Ends the process immediately, from any thread.
pub(super) fn leave(exit: Exit) -> ! {
    flush();
    std::process::exit(exit.code().into())
}

/// Where logs go.
#[derive(Clone, Copy)]
pub(super) struct Logs;

impl<'a> MakeWriter<'a> for Logs {
    type Writer = Log;

    fn make_writer(&'a self) -> Log {
        Log { priority: priority::INFO }
    }

    fn make_writer_for(&'a self, about: &Metadata<'_>) -> Log {
        Log { priority: priority_of(*about.level()) }
    }
}

fn priority_of(level: Level) -> u8 {
    match level {
        Level::ERROR => priority::ERROR,
        Level::WARN => priority::WARNING,
        Level::INFO => priority::INFO,
        Level::DEBUG | Level::TRACE => priority::DEBUG,
    }
}

/// The writer of one event.
pub(super) struct Log {
    priority: u8,
}

impl Write for Log {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        put_lines(self.priority, &String::from_utf8_lossy(text));
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Accepts nothing until it is released, then keeps everything.
    struct Stopped(Receiver<()>, Sender<Vec<u8>>);

    impl Write for Stopped {
        fn write(&mut self, text: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            self.1.send(text.to_vec()).unwrap();
            Ok(text.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stream_that_stands_still_holds_no_writer_up_and_costs_bounded_memory() {
        let ((go, stopped), (give, taken)) = (bounded(0), unbounded());
        let queue = Queue::start(Stopped(stopped, give)).unwrap();
        let line = vec![b'x'; 1 << 20];
        // Each of these returns although no line is written.
        (0..20).for_each(|_| queue.put(&line));
        assert!(queue.waiting.load(Ordering::Acquire) <= MAX_WAITING);
        assert_eq!(queue.left_out.load(Ordering::Relaxed), 4);
        // From here on every line is accepted.
        drop(go);
        queue.flush(Duration::from_secs(60));
        queue.put(b"last\n");
        queue.flush(Duration::from_secs(60));
        let all: Vec<Vec<u8>> = taken.try_iter().collect();
        assert_eq!(all.len(), 17);
        let last = String::from_utf8(all[16].clone()).unwrap();
        assert_eq!(last, "ramwire: 4 lines were left out: standard error was not read\nlast\n");
    }

    #[test]
    fn each_line_of_the_journal_has_a_priority() {
        assert_eq!(prefixed(priority::ERROR, "in doubt:\nlook there\n"), "<3>in doubt:\n<3>look there\n");
        let levels = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
        assert_eq!(levels.map(priority_of), [3, 4, 6, 7, 7], "as in syslog(3)");
    }

    #[test]
    fn what_goes_wrong_again_and_again_is_noted_once() {
        let mut failing = Repeated::default();
        let noted: Vec<_> = ["one", "one", "two", "two", "one"].map(|text| failing.note(text.into())).into();
        assert_eq!(noted, [true, false, true, false, true]);
        failing.passed();
        assert!(failing.note("one".into()));
    }

    /// Fails always.
    struct Closed;

    impl Write for Closed {
        fn write(&mut self, _text: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_closed_stream_is_survived() {
        let queue = Queue::start(Closed).unwrap();
        queue.put(b"one\n");
        queue.put(b"two\n");
        queue.flush(Duration::from_secs(60));
        assert_eq!(queue.waiting.load(Ordering::Acquire), 0);
    }
}
