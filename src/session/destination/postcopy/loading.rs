//! The start of a guest whose device state has come in a package: the work of the thread `ramwire-load`.

use std::sync::atomic::Ordering;

use crate::engine::Ownership;
use crate::guest::{GuestControl, load_state};
use crate::observe::Status;
use crate::session::Error;
use crate::session::callback::guarded;
use crate::stream::qemu::package::PING_TAKEN;
use crate::stream::qemu::return_path::Message;
use crate::sys::{Lock as _, Stop, StopReason};
use crate::transport::ChannelError;

use super::Shared;

/// Why a guest whose state has come was not started.
pub(super) enum NotStarted {
    Failed(Error),
    /// Its source keeps it.
    GivenUp,
}

impl From<Error> for NotStarted {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<NotStarted> for Error {
    fn from(why: NotStarted) -> Self {
        let doing = "starting a guest whose source keeps it";
        match why {
            NotStarted::Failed(error) => error,
            NotStarted::GivenUp => ChannelError::Stopped { reason: StopReason::Cancelled, doing }.into(),
        }
    }
}

/// Loads the device state, answers the package, and starts the guest.
pub(super) fn load_and_run(
    shared: &Shared,
    control: &mut Box<dyn GuestControl>,
    state: &[u8],
    pings: &[u32],
) -> Result<(), NotStarted> {
    let loaded = guarded("loading the device state", || load_state(control.as_mut(), state))?;
    loaded.map_err(|source| Error::Control { what: "load its device state", source })?;
    for value in pings {
        if *value == PING_TAKEN {
            if !shared.owner.step(Ownership::answering) {
                return Err(NotStarted::GivenUp);
            }
            // Before the connection is chosen: a RESUME on a later one finds it, and sends the answer there.
            shared.answered.store(true, Ordering::Release);
        }
        let connection = shared.connection.locked().clone();
        let stop = Stop::on(&connection);
        let said = shared.back.message(Message::Pong(*value), &stop.within(shared.send_timeout));
        let Err(error) = said.and_then(|()| shared.delivered(*value, &stop)) else { continue };
        match shared.owner.get() {
            // A source that does not wait for this answer has handed the guest over by the package.
            Ownership::Here => {}
            // The answer may have arrived nevertheless: another connection of the source proves it.
            Ownership::Unknown => {
                connection.cancel();
                if !shared.owner.wait_until_known() {
                    return Err(NotStarted::GivenUp);
                }
            }
            // It waits for the next answer, which may go on another connection.
            Ownership::Source if shared.native => {}
            Ownership::Source => return Err(Error::from(error).into()),
            Ownership::GivenUp => return Err(NotStarted::GivenUp),
        }
    }
    if !shared.owner.step(Ownership::proven) {
        return Err(NotStarted::GivenUp);
    }
    // A connection that was lost meanwhile reports that itself.
    shared.statistics.update(|s| {
        if s.status == Status::Device {
            s.status = Status::PostcopyActive;
        }
    });
    let started = guarded("calling GuestControl::resume", || control.resume())?;
    Ok(started.map_err(|source| Error::Control { what: "resume", source })?)
}
