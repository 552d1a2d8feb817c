//! Control of the connection of a postcopy by an operator, while the source uses it.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::error::Remedy;
use crate::sys::{CancelToken, Lock as _, Stop};
use crate::transport::Address;

use super::Error;

/// The connection after a switch to postcopy, shared by its session and an operator. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct ConnectionHandle(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    stage: Stage,
    /// Ends the waits of the present connection, or the wait for the next.
    token: CancelToken,
    /// Address of the next connection.
    address: Option<Address>,
    /// No connection is attempted until an address is given.
    held: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    /// The guest runs here, or is being migrated without postcopy.
    #[default]
    Before,
    /// It was handed over, and the connection is in use.
    Connected,
    /// It was handed over, and there is no connection.
    Lost,
}

/// How to attempt the next connection.
pub(super) struct Attempt {
    /// The address; `None`: the known address of the destination.
    pub(super) address: Option<Address>,
    /// Not now.
    pub(super) held: bool,
    /// Ends when another command arrives.
    pub(super) stop: Stop,
}

impl Attempt {
    /// Where the destination is known to be; nothing but `stop` ends it.
    pub(super) fn until(stop: Stop) -> Self {
        Self { address: None, held: false, stop }
    }
}

impl ConnectionHandle {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.locked()
    }

    /// Closes the connection; none is attempted until [`recover`](Self::recover).
    pub(super) fn pause(&self) -> Result<(), Error> {
        let mut state = self.lock();
        state.must_be_behind_the_switch()?;
        state.held = true;
        state.token.cancel();
        Ok(())
    }

    /// Connects to `address`, now.
    pub(super) fn recover(&self, address: Address) -> Result<(), Error> {
        let mut state = self.lock();
        state.must_be_behind_the_switch()?;
        (state.held, state.address) = (false, Some(address));
        state.token.cancel();
        Ok(())
    }

    /// A connection is in use after the switch; the returned `Stop` ends the waits on it.
    pub(super) fn connected(&self) -> Stop {
        let mut state = self.lock();
        state.stage = Stage::Connected;
        // A command that arrived while this connection was made is still to be executed.
        if state.address.is_none() && !state.held {
            state.token = CancelToken::default();
        }
        Stop::on(&state.token)
    }

    /// The `Stop` that ends the waits on the present connection.
    pub(super) fn stop(&self) -> Stop {
        Stop::on(&self.lock().token)
    }

    /// There is no connection: returns what to attempt next. An address is returned only once.
    pub(super) fn next(&self) -> Attempt {
        let mut state = self.lock();
        (state.stage, state.token) = (Stage::Lost, CancelToken::default());
        let stop = Stop::on(&state.token);
        Attempt { address: state.address.take(), held: state.held, stop }
    }

    /// The migration has ended.
    pub(super) fn over(&self) {
        self.lock().stage = Stage::Before;
    }
}

impl State {
    fn must_be_behind_the_switch(&self) -> Result<(), Error> {
        if self.stage != Stage::Before {
            return Ok(());
        }
        Err(Error::Config {
            what: "the guest does not run at the destination while memory is missing there: only then is a connection \
                   paused and replaced"
                .into(),
            remedy: Remedy::Advice("wait until the migration has switched to postcopy, or cancel it"),
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn address(port: u16) -> Address {
        format!("tcp:127.0.0.1:{port}").parse().unwrap()
    }

    #[test]
    fn what_is_asked_for_ends_the_wait_of_the_moment_and_is_done_once() {
        let connection = ConnectionHandle::default();
        assert!(connection.pause().is_err() && connection.recover(address(1)).is_err(), "not switched yet");
        let first = connection.connected();
        assert!(first.reason().is_none());
        connection.pause().unwrap();
        assert!(first.reason().is_some());
        let waits = connection.next();
        assert!(waits.held && waits.address.is_none() && waits.stop.reason().is_none());
        connection.recover(address(2)).unwrap();
        assert!(waits.stop.reason().is_some());
        let tries = connection.next();
        assert_eq!((tries.held, tries.address), (false, Some(address(2))));
        assert!(connection.next().address.is_none(), "by then it is where the destination is known to be");
        // While a connection is being made: it is dropped for the requested one.
        connection.recover(address(3)).unwrap();
        assert!(connection.connected().reason().is_some());
        assert_eq!(connection.next().address, Some(address(3)));
        assert!(connection.connected().reason().is_none());
        connection.over();
        assert!(connection.pause().is_err());
    }
}
