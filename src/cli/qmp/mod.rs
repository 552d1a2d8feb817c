//! `--qmp`: a monitor that speaks QEMU's protocol (QMP), for tools that know QEMU's migration commands.
//!
//! `framing` finds values in bytes, `conversation` obeys one client's commands by the rows of `commands`, `subject` is
//! the migration that they act on, and `server` is the one thread that has all clients. A migration is changed through
//! the library's `session::Control`, as are all settings that may change while it runs.

mod client;
mod commands;
mod conversation;
mod events;
mod failure;
mod framing;
mod kind;
#[cfg(test)]
mod libvirt;
mod listener;
mod plan;
mod server;
mod subject;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use super::output::note;
pub(super) use framing::Framing;
use listener::Listener;
pub(super) use listener::Place;
pub(super) use plan::Plan;
pub(super) use server::Monitor;
pub(super) use subject::{Order, Role, Subject};

/// The option.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct QmpArgs {
    /// Take commands of QEMU's monitor protocol (QMP) at unix:PATH, which only this user may connect to, or
    /// tcp:HOST:PORT, where any client that can connect may give commands
    #[arg(long, value_name = "PLACE")]
    qmp: Option<Place>,
}

impl QmpArgs {
    /// A monitor is requested.
    pub(super) fn is_given(&self) -> bool {
        self.qmp.is_some()
    }

    /// True if other users may reach it: a client's commands are then not this user's commands.
    pub(super) fn is_reached_by_others(&self) -> bool {
        matches!(self.qmp, Some(Place::Tcp(_)))
    }

    /// Takes commands for `subject` if that was requested, until the returned monitor is dropped; prints where on
    /// standard error.
    pub(super) fn serve(&self, command: &str, subject: &Arc<Subject>) -> Result<Option<Monitor>, String> {
        let Some(place) = &self.qmp else { return Ok(None) };
        let failed = |error: io::Error| {
            let remedy = match error.kind() {
                io::ErrorKind::AddrInUse => {
                    "another program listens there, or it is no socket: name another place"
                }
                io::ErrorKind::NotFound => "make its directory first",
                _ => "name another place",
            };
            format!("--qmp {place}: {error}; {remedy}")
        };
        let listener = Listener::at(place).map_err(failed)?;
        if listener.is_open_to_the_network() {
            note!(
                "ramwire {command}: any client that can connect to {} may {}",
                listener.place(),
                if subject.role() == Role::Server { "end this process" } else { "cancel this migration" }
            );
        }
        note!("ramwire {command}: QMP at {}", listener.place());
        Monitor::start(listener, Arc::clone(subject)).map(Some).map_err(failed)
    }
}
