//! `ramwire receive --colo`: the folder as the standby of a QEMU that runs.

use std::sync::{Arc, OnceLock};

use ramwire::session::{
    CancelReply, DestinationGuest, StandbyControl, StandbyEnding, StandbyObserver, StandbyReport,
    StandbySession, StandbySettings, WhenLost,
};
use ramwire::transport::StreamChannel;
use serde_json::json;

use super::Args;
use crate::cli::args::Exit;
use crate::cli::common::complain;
use crate::cli::output::{note, result_line};
use crate::cli::remedies::in_words;
use crate::cli::signals::SignalWatch;
use crate::cli::store::{IncomingGuest, State};

/// Commands for the standby, of signals and of the monitor: once there is one.
pub(super) type Running = Arc<OnceLock<StandbyControl>>;

/// What an operator does about a guest whose source was lost.
const LOST: &str = "in doubt: the source was lost, and may run its guest. Look there first: if it does, delete the \
                    folder; if it is dead, `ramwire send --destination-is-dead` lets the guest go on from its last \
                    checkpoint";

/// Stores the guest of a source that is lost, in doubt: nothing here knows whether it runs there.
struct Keeper(IncomingGuest);

impl StandbyObserver for Keeper {
    fn applied(&mut self, number: u64) {
        if number == 1 {
            note!("ramwire receive: protected: the guest is here as it was at its first checkpoint");
        }
    }

    fn lost(&mut self, number: u64) -> WhenLost {
        if number == 0 {
            return WhenLost::Discard;
        }
        self.0.source_may_run();
        WhenLost::Start
    }
}

/// The monitor's `x-colo-lost-heartbeat`: the operator says that the source is dead. An error says why not.
pub(super) fn failover(running: &Running) -> Result<(), String> {
    let standby = running.get().ok_or("no checkpoints are kept: there is no source yet")?;
    standby.activate();
    Ok(())
}

/// Gives the guest up, on request.
pub(super) fn give_up(running: &Running) -> CancelReply {
    if let Some(standby) = running.get() {
        standby.discard();
    }
    CancelReply::Accepted
}

/// Keeps checkpoints until the source is lost, or a command comes.
pub(super) fn keep(
    args: &Args,
    guest: &IncomingGuest,
    channel: StreamChannel,
    running: &Running,
    signals: &SignalWatch,
) -> Result<Exit, Box<dyn std::error::Error>> {
    let mut settings = StandbySettings::default();
    settings.max_ram = args.max_ram;
    settings.checkpoint_timeout = args.timeouts.finish_timeout;
    let theirs = DestinationGuest { memory: Box::new(guest.clone()), control: Box::new(guest.clone()) };
    let session =
        StandbySession::of_qemu(theirs, channel, settings).with_observer(Box::new(Keeper(guest.clone())));
    let standby = session.spawn()?;
    // One standby a process.
    let _ = running.set(standby.control());
    let cancels = Arc::clone(running);
    signals.ask_by(move || give_up(&cancels));
    let report = standby.wait()?;
    let exit = match report.ending {
        StandbyEnding::Active(_) => {
            let bytes = guest.release();
            tracing::info!(bytes, "room of pages that stayed zero was given back");
            if guest.state() == State::InDoubt { Exit::InDoubt } else { Exit::Done }
        }
        // It may be all that is left of the guest.
        StandbyEnding::Stranded(_) => Exit::InDoubt,
        StandbyEnding::Nothing | StandbyEnding::Discarded | StandbyEnding::Released => {
            guest.discard();
            if report.error.is_some() { Exit::Failed } else { Exit::Cancelled }
        }
    };
    signals.ended(exit);
    tell(args, guest, &report, exit);
    Ok(exit)
}

fn tell(args: &Args, guest: &IncomingGuest, report: &StandbyReport, exit: Exit) {
    if let Some(error) = &report.error {
        complain("receive", error);
    }
    let manifest = guest.manifest();
    let arrived = matches!(report.ending, StandbyEnding::Active(_));
    if exit == Exit::InDoubt {
        note!("ramwire receive: {LOST}");
    }
    if args.json {
        let out = json!({
            "outcome": exit.word(),
            "arrived": arrived,
            "state": guest.state(),
            "checkpoints": report.last,
            "source": "qemu",
            "blocks": manifest.map(|manifest| manifest.blocks),
            "error": report.error.as_ref().map(|error| in_words(error)),
        });
        result_line!("{out}");
    } else if arrived {
        result_line!("in {}: the guest as it was at checkpoint {}", args.dir.display(), report.last);
    }
}
