//! The subject of `send`'s monitor, and its orders to `send`.

use std::error::Error;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crossbeam::channel::{Receiver, unbounded};
use ramwire::observe::{SharedStatistics, Status};
use ramwire::session::{CancelReply, Control};
use ramwire::sys::CancelToken;
use ramwire::transport::Address;

use super::super::qmp::{Order, Role, Subject};
use super::super::remedies::in_words;
use super::Args;

/// Interval between two checks for a signal while waiting for an order.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The only schemes that a client may name that need not be this user: others name files and commands of this host.
const NETWORK: [&str; 3] = ["tcp", "rdma", "auto"];

/// A migration as the monitor's clients control it.
pub(super) struct Controlled {
    pub(super) statistics: SharedStatistics,
    pub(super) subject: Arc<Subject>,
    control: Arc<OnceLock<Control>>,
    orders: Receiver<Order>,
    /// Raised by a signal, and by no client.
    stopped: CancelToken,
}

impl Controlled {
    /// Until the session is there, a cancel raises `cancel`. A signal raises `stopped` too, and ends the wait for a client.
    pub(super) fn new(args: &Args, cancel: &CancelToken, stopped: CancelToken) -> Self {
        let statistics = SharedStatistics::default();
        let (give, orders) = unbounded();
        let control: Arc<OnceLock<Control>> = Arc::default();
        let (early, late, of) = (cancel.clone(), Arc::clone(&control), Arc::clone(&control));
        let cancels = move || match late.get() {
            Some(control) => control.cancel(),
            None => {
                early.cancel();
                CancelReply::Accepted
            }
        };
        let (tls, by_others) = (args.tls.clone(), args.qmp.is_reached_by_others());
        let admits = move |uri: &str| {
            let address: Address = uri.parse().map_err(|error| format!("'{uri}': {}", in_words(&error)))?;
            if by_others && !NETWORK.contains(&address.scheme()) {
                let scheme = address.scheme();
                return Err(format!(
                    "{scheme}: is taken only by a monitor at a unix: path, which is this user's"
                ));
            }
            tls.at(&address).map_err(|error| in_words(&*error))
        };
        let mut subject = Subject::new(Role::Source, statistics.clone(), args.plan(), cancels)
            .controlled(move || of.get().cloned())
            .admitting(admits);
        if args.uri.is_none() {
            subject = subject.waiting(give);
        }
        Self { statistics, subject: Arc::new(subject), control, orders, stopped }
    }

    /// The session is there.
    pub(super) fn follow(&self, control: Control) {
        // One session a process.
        let _ = self.control.set(control.clone());
        self.subject.follow(&control);
    }

    /// Waits until a client gives the destination: the address and the options as planned. `None`: the process is to
    /// end.
    pub(super) fn wait_for_migrate(&self, args: &Args) -> Option<(Address, Args)> {
        match self.next()? {
            Order::Quit => None,
            Order::Migrate(what) => {
                let (address, plan) = *what;
                self.statistics.update(|now| now.status = Status::Setup);
                Some((address, args.following(&plan)))
            }
        }
    }

    /// The migration has ended: waits until a client lets the process end.
    pub(super) fn wait_for_quit(&self) {
        // The only order that is left, or a signal.
        let _ = self.next();
    }

    /// Ended before it was a migration.
    pub(super) fn failed(&self, error: &(dyn Error + 'static), cancel: &CancelToken) {
        let why = in_words(error);
        let status = if cancel.is_cancelled() { Status::Cancelled } else { Status::Failed };
        self.statistics.update(|now| {
            if !now.ended {
                (now.status, now.error, now.ended) = (status, Some(why), true);
            }
        });
    }

    fn next(&self) -> Option<Order> {
        loop {
            if let Ok(order) = self.orders.recv_timeout(POLL_INTERVAL) {
                return Some(order);
            }
            if self.stopped.is_cancelled() {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::super::super::qmp::Plan;
    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn plan_of(options: &[&str]) -> (Args, Plan) {
        let line = ["send", "tcp:host:1", "--dir", "x"].iter().chain(options);
        let args = Line::try_parse_from(line).unwrap().args;
        let plan = args.plan();
        (args, plan)
    }

    /// Options converted to a plan and back are unchanged, and so is a plan converted to options and back.
    #[test]
    fn options_and_plan_say_the_same() {
        let cases: &[&[&str]] = &[
            &[],
            &["--max-bandwidth", "5M", "--downtime-ms", "20", "--zero-page", "legacy"],
            &["--channels", "7", "--compression", "zstd:3", "--send-pages", "copy"],
            &["--channels", "2", "--send-pages", "zerocopy"],
            &["--xbzrle-cache-size", "32M"],
            &["--postcopy", "--max-postcopy-bandwidth", "1M", "--postcopy-preempt"],
            &["--pin-all"],
            &["--qmp", "unix:x", "--pause-before-switchover"],
        ];
        let (bare, nothing) = plan_of(&[]);
        for options in cases {
            let (args, plan) = plan_of(options);
            assert_eq!(options.is_empty(), plan == nothing, "{options:?}");
            assert_eq!(args.following(&plan).plan(), plan, "{options:?}");
            assert_eq!(bare.following(&plan).plan(), plan, "{options:?}");
            assert_eq!(args.following(&nothing).plan(), nothing, "{options:?}");
            assert!(bare.following(&plan).channels.options().is_ok(), "{options:?}");
        }
    }
}
