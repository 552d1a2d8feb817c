//! SIGINT, SIGTERM and SIGHUP: the first cancels, a second one ends the process immediately, with the status that is
//! correct at that moment.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ramwire::observe::{SharedStatistics, Status};
use ramwire::session::{CancelReply, Canceller};
use ramwire::sys::{CancelToken, survive_lost_memory};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::iterator::Signals;

use super::args::Exit;
use super::output::{self, note};

/// Cleanup before the process ends by a signal; it receives the status.
type Tidy = Box<dyn FnOnce(Exit) + Send>;

/// Requests the end of the running work.
type Asks = Box<dyn Fn() -> CancelReply + Send + Sync>;

/// Returns a message while a guest is in doubt whose connection another process holds: this process may then end.
type SaysInDoubt = Box<dyn Fn() -> Option<String> + Send + Sync>;

/// What a second signal leaves in doubt, and what an operator does then; receives whether a cancel came too late. `None`:
/// a cancel that was in time leaves nothing in doubt.
type SaysWhatIsLeft = Box<dyn Fn(CancelReply) -> Option<String> + Send + Sync>;

/// Gives the signal thread the state of the migration.
#[derive(Clone, Default)]
pub(super) struct SignalWatch(Arc<Watch>);

#[derive(Default)]
struct Watch {
    tokens: Vec<CancelToken>,
    canceller: OnceLock<Asks>,
    in_doubt: OnceLock<SaysInDoubt>,
    left: OnceLock<SaysWhatIsLeft>,
    statistics: OnceLock<SharedStatistics>,
    tidy: Mutex<Option<Tidy>>,
    ended: OnceLock<Exit>,
}

/// The action of a signal.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Cancelling,
    TooLate,
    /// Another process continues with a guest in doubt.
    LeaveInDoubt(String),
    /// The guest may be at either end, or in postcopy in parts at both.
    LeaveUnsettled(String),
    Leave(Exit),
}

impl SignalWatch {
    // There is one session per process: the first one set stays.

    /// From here on a signal requests the end of this session, whose reply is exact.
    pub(super) fn ask(&self, canceller: Canceller) {
        self.ask_by(move || canceller.cancel());
    }

    /// The same for something other than a session.
    pub(super) fn ask_by(&self, cancel: impl Fn() -> CancelReply + Send + Sync + 'static) {
        let _ = self.0.canceller.set(Box::new(cancel));
    }

    /// From here on a signal ends the process immediately while `says` returns a message.
    pub(super) fn in_doubt(&self, says: impl Fn() -> Option<String> + Send + Sync + 'static) {
        let _ = self.0.in_doubt.set(Box::new(says));
    }

    /// What a second signal says of the guest, unless it certainly stays at its source.
    pub(super) fn leaves(&self, says: impl Fn(CancelReply) -> Option<String> + Send + Sync + 'static) {
        let _ = self.0.left.set(Box::new(says));
    }

    /// From here on these figures show whether the guest was handed over.
    pub(super) fn follow(&self, statistics: SharedStatistics) {
        let _ = self.0.statistics.set(statistics);
    }

    /// Runs `tidy` before a signal ends the process.
    pub(super) fn before_leaving(&self, tidy: impl FnOnce(Exit) + Send + 'static) {
        *self.0.tidy.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(tidy));
    }

    /// The outcome is final: from here on a signal ends the process with this status.
    pub(super) fn ended(&self, exit: Exit) {
        let _ = self.0.ended.set(exit);
    }
}

impl Watch {
    fn status(&self) -> Option<Status> {
        self.statistics.get().map(|statistics| statistics.snapshot().status)
    }

    /// The action for signal number `count`, from 0 on.
    fn signalled(&self, count: usize) -> Answer {
        if let Some(exit) = self.ended.get() {
            return Answer::Leave(*exit);
        }
        if let Some(text) = self.in_doubt.get().and_then(|says| says()) {
            return Answer::LeaveInDoubt(text);
        }
        let reply = match self.canceller.get() {
            Some(cancel) => cancel(),
            None if matches!(
                self.status(),
                Some(
                    Status::HandingOver
                        | Status::PostcopyActive
                        | Status::PostcopyPaused
                        | Status::PostcopyRecover
                        | Status::InDoubt
                )
            ) =>
            {
                CancelReply::TooLate
            }
            None => CancelReply::Accepted,
        };
        // The tokens belong also to other work than the session.
        self.tokens.iter().for_each(CancelToken::cancel);
        match (reply, count) {
            (CancelReply::Accepted, 0) => Answer::Cancelling,
            (CancelReply::TooLate, 0) => Answer::TooLate,
            // Only the disconnect is still in progress.
            (CancelReply::TooLate, _) if self.status() == Some(Status::Completed) => {
                Answer::Leave(Exit::Done)
            }
            (reply, _) => match (self.left.get().and_then(|says| says(reply)), reply) {
                (Some(text), _) => Answer::LeaveUnsettled(text),
                (None, CancelReply::Accepted) => Answer::Leave(Exit::Cancelled),
                (None, CancelReply::TooLate) => Answer::LeaveUnsettled(NOT_REPORTED.into()),
            },
        }
    }

    fn tidy(&self, exit: Exit) {
        let tidy = self.tidy.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(tidy) = tidy {
            tidy(exit);
        }
    }
}

/// What a second signal says where nothing else is known.
const NOT_REPORTED: &str =
    "in doubt: the destination has not reported that the guest runs; check the destination";

/// The first SIGINT, SIGTERM or SIGHUP cancels, a second one exits immediately: status 4, or 5 once the guest was
/// handed over. SIGHUP stays ignored if it was, as under nohup(1).
pub(super) fn cancel_on_signal(tokens: Vec<CancelToken>) -> SignalWatch {
    let watch = SignalWatch(Arc::new(Watch { tokens, ..Watch::default() }));
    let seen = Arc::clone(&watch.0);
    let hang_up = (!is_ignored(SIGHUP)).then_some(SIGHUP);
    // The thread is started first: handlers without it would swallow each signal (RLIMIT_NPROC), and only SIGKILL would
    // be left.
    let (made, ready) = std::sync::mpsc::sync_channel(1);
    let spawned = std::thread::Builder::new().name("ramwire-signals".into()).spawn(move || {
        let signals = Signals::new([SIGINT, SIGTERM].into_iter().chain(hang_up));
        // The other end waits for this one message.
        let _ = made.send(signals.is_ok());
        let Ok(mut signals) = signals else { return };
        for (count, _) in signals.forever().enumerate() {
            match seen.signalled(count) {
                Answer::Cancelling if std::io::stderr().is_terminal() => {
                    note!("cancelling; once more to exit without waiting");
                }
                Answer::Cancelling => {}
                Answer::TooLate => {
                    note!("too late to cancel: the guest was given away; waiting until it runs");
                }
                Answer::LeaveInDoubt(text) | Answer::LeaveUnsettled(text) => {
                    note!("{text}");
                    seen.tidy(Exit::InDoubt);
                    output::leave(Exit::InDoubt);
                }
                Answer::Leave(exit) => {
                    seen.tidy(exit);
                    output::leave(exit);
                }
            }
        }
    });
    let handled = spawned.is_ok() && ready.recv().unwrap_or(false);
    if !handled {
        tracing::warn!("no signal handler: a signal ends the process at once");
    }
    watch
}

/// Signals that a file can cause become errors of the call or of the guest's memory: a truncated mapped file (SIGBUS),
/// a file beyond the process's limit (SIGXFSZ).
pub(super) fn survive_faults_of_files() {
    if let Err(error) = survive_lost_memory() {
        tracing::warn!(%error, "a RAM file that is truncated ends the process");
    }
    // With a handler for SIGXFSZ the call returns EFBIG.
    if let Err(error) = signal_hook::flag::register(SIGXFSZ, Arc::default()) {
        tracing::warn!(%error, "a file beyond the limit of file sizes ends the process");
    }
}

/// True if the process was started with `signal` ignored (proc(5), SigIgn).
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cancel that was in time leaves the guest with a source that keeps it, and in doubt with one that may not have.
    #[test]
    fn a_second_signal_to_one_that_has_cancelled_says_what_the_command_knows() {
        let watch = SignalWatch::default();
        assert_eq!(watch.0.signalled(1), Answer::Leave(Exit::Cancelled));
        watch.leaves(|reply| Some(format!("{reply:?}")));
        assert_eq!(watch.0.signalled(1), Answer::LeaveUnsettled("Accepted".into()));
    }

    #[test]
    fn the_status_of_a_second_signal_is_what_is_true() {
        let watch = SignalWatch::default();
        assert_eq!(watch.0.signalled(0), Answer::Cancelling);
        assert_eq!(watch.0.signalled(1), Answer::Leave(Exit::Cancelled));
        let statistics = SharedStatistics::default();
        watch.follow(statistics.clone());
        statistics.update(|figures| figures.status = Status::HandingOver);
        assert_eq!(watch.0.signalled(0), Answer::TooLate);
        assert_eq!(watch.0.signalled(1), Answer::LeaveUnsettled(NOT_REPORTED.into()));
        let late = |reply| (reply == CancelReply::TooLate).then(|| "pages are missing there".into());
        watch.leaves(late);
        assert_eq!(watch.0.signalled(1), Answer::LeaveUnsettled("pages are missing there".into()));
        watch.ended(Exit::NotVerified);
        assert_eq!(watch.0.signalled(0), Answer::Leave(Exit::NotVerified), "a report that is not read");
    }
}
