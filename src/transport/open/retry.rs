//! Retries while no process listens yet: a destination may be started after its source.

use std::io;
use std::time::Duration;

use super::{Address, Obstacle, OpenError, obstacle};
use crate::sys::{Stop, StopReason};
use crate::transport::ChannelError;

/// Time between two tries: peers get no event when a listener starts.
const AGAIN: Duration = Duration::from_millis(100);

/// Calls `open` until a process listens at `address`, for at most `time` from now.
///
/// # Errors
/// The error of the last try.
///
/// Only a connection that was never accepted is retried: a destination that accepts a single source has lost it.
pub(in crate::transport) fn retry_until_listening<T>(
    address: &Address,
    time: Duration,
    stop: &Stop,
    mut open: impl FnMut() -> Result<T, OpenError>,
) -> Result<T, OpenError> {
    let limit = stop.within(time);
    let mut told = false;
    loop {
        let error = match open() {
            Err(error) if !time.is_zero() && is_not_listening(&error) => error,
            opened => return opened,
        };
        if !told {
            tracing::warn!("no process listens at {address} yet; trying again for {} s", time.as_secs_f64());
            told = true;
        }
        match limit.sleep(AGAIN) {
            None => {}
            Some(StopReason::Cancelled) => {
                let (reason, doing) = (StopReason::Cancelled, "waiting until the destination listens");
                return Err(ChannelError::Stopped { reason, doing }.into());
            }
            Some(_) => return Err(error),
        }
    }
}

/// True if the connection failed because no process listens there yet, or because the host is not up.
fn is_not_listening(error: &OpenError) -> bool {
    match error {
        OpenError::Channel(ChannelError::Io { source, .. }) => matches!(
            source.kind(),
            io::ErrorKind::ConnectionRefused
                | io::ErrorKind::NotFound
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
        ),
        OpenError::Channel(ChannelError::Rdma { .. }) => obstacle::of(error) == Obstacle::Refused,
        OpenError::Neither { tcp, .. } => is_not_listening(tcp),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::sys::CancelToken;
    use crate::transport::{StreamOptions, connect};

    const LONG: Duration = Duration::from_secs(600);

    fn stream(address: &Address) -> Result<(), OpenError> {
        connect(address, &StreamOptions::default(), &Stop::never()).map(drop)
    }

    /// A port without a listener: the connection that reserved it uses it as its local port.
    fn free_port() -> (u16, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connected = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (connected.local_addr().unwrap().port(), connected)
    }

    #[test]
    fn a_listener_that_begins_late_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("late");
        let address = Address::unix(path.clone());
        let (mut tries, mut listener) = (0, None);
        let open = || {
            tries += 1;
            if tries == 3 {
                listener = Some(UnixListener::bind(&path).unwrap());
            }
            stream(&address)
        };
        retry_until_listening(&address, LONG, &Stop::never(), open).unwrap();
        assert_eq!((tries, listener.is_some()), (3, true));
    }

    #[test]
    fn a_port_without_a_listener_is_tried_again_and_its_error_is_told_in_the_end() {
        let (port, _held) = free_port();
        let address = Address::tcp("127.0.0.1", port);
        let mut tries = 0;
        let open = || {
            tries += 1;
            stream(&address)
        };
        let error = retry_until_listening(&address, AGAIN * 3, &Stop::never(), open).unwrap_err();
        assert!(is_not_listening(&error), "{error}");
        assert!(tries > 1, "{tries}");
    }

    /// Without the option, or for an error other than a missing listener: one try.
    #[test]
    fn what_waiting_can_not_mend_is_tried_once() {
        let (port, _held) = free_port();
        let tcp = Address::tcp("127.0.0.1", port);
        let other = "exec:true".parse::<Address>().unwrap();
        let mut tries = 0;
        let refused = retry_until_listening(&tcp, Duration::ZERO, &Stop::never(), || {
            tries += 1;
            stream(&tcp)
        });
        assert!(refused.is_err());
        let failed = retry_until_listening(&other, LONG, &Stop::never(), || -> Result<(), _> {
            tries += 1;
            Err(OpenError::OnlyOne { address: other.to_string() })
        });
        assert!(matches!(failed, Err(OpenError::OnlyOne { .. })));
        assert_eq!(tries, 2);
    }

    #[test]
    fn a_cancel_ends_the_tries() {
        let cancel = CancelToken::default();
        let (port, _held) = free_port();
        let address = Address::tcp("127.0.0.1", port);
        let ended = retry_until_listening(&address, LONG, &Stop::on(&cancel), || {
            cancel.cancel();
            stream(&address)
        });
        let stopped = |error| {
            matches!(error, OpenError::Channel(ChannelError::Stopped { reason: StopReason::Cancelled, .. }))
        };
        assert!(ended.is_err_and(stopped));
    }
}
