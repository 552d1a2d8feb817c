//! Words to the service manager that has started this process (systemd, `Type=notify`; sd_notify(3)): that it is ready,
//! and a status line. Without one nothing happens.
//!
//! A message is one datagram to the socket that `NOTIFY_SOCKET` names. Nothing waits for it, and one that can't be sent
//! is left out: a manager never holds up a guest.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::observe::{SharedStatistics, Statistics};
use ramwire::sys::{CancelToken, Stop};

use super::common::human_bytes;

/// How often the status line of a migration is renewed.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// It listens, or does what it was started for.
pub(super) fn ready(status: &str) {
    send(&format!("READY=1\n{}", line(status)));
}

/// The status line.
pub(super) fn status(status: &str) {
    send(&line(status));
}

/// One line, whatever is in `text`.
fn line(text: &str) -> String {
    let plain: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    format!("STATUS={plain}\n")
}

fn manager() -> Option<&'static (UnixDatagram, SocketAddr)> {
    static MANAGER: OnceLock<Option<(UnixDatagram, SocketAddr)>> = OnceLock::new();
    let connected = || {
        let place: OsString = std::env::var_os("NOTIFY_SOCKET")?;
        let socket = UnixDatagram::unbound().ok()?;
        socket.set_nonblocking(true).ok()?;
        Some((socket, address(&place)?))
    };
    MANAGER.get_or_init(connected).as_ref()
}

/// A path, or a name in the abstract namespace after `@`. A manager outside a virtual machine (vsock:) is not spoken to.
fn address(place: &OsStr) -> Option<SocketAddr> {
    match place.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name).ok(),
        [b'/', ..] => SocketAddr::from_pathname(place).ok(),
        _ => None,
    }
}

fn send(text: &str) {
    if let Some((socket, address)) = manager()
        && let Err(error) = socket.send_to_addr(text.as_bytes(), address)
    {
        tracing::debug!(%error, "the service manager was not told");
    }
}

/// Renews the status line until it is dropped.
#[derive(Default)]
pub(super) struct StatusLine {
    cancel: CancelToken,
    thread: Option<JoinHandle<()>>,
}

impl StatusLine {
    /// Of a migration, if a service manager has started this process.
    pub(super) fn follow(statistics: SharedStatistics) -> Self {
        if manager().is_none() {
            return Self::default();
        }
        let cancel = CancelToken::default();
        let stop = Stop::on(&cancel);
        let tell = move || {
            let mut last = String::new();
            while stop.sleep(STATUS_INTERVAL).is_none() {
                let now = words(&statistics.snapshot());
                if let Some(now) = now.filter(|now| *now != last) {
                    status(&now);
                    last = now;
                }
            }
        };
        let thread = std::thread::Builder::new().name("ramwire-service".into()).spawn(tell);
        Self { cancel, thread: thread.ok() }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// `None` before it is known how much RAM there is.
fn words(now: &Statistics) -> Option<String> {
    let status = serde_json::to_value(now.status).ok()?;
    let done = human_bytes(now.total.saturating_sub(now.remaining));
    let (status, total, rate) = (status.as_str()?, human_bytes(now.total), human_bytes(now.throughput));
    (now.total > 0).then(|| format!("{status}: {done} of {total}, {rate}/s"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_status_is_one_line() {
        assert_eq!(line("in doubt:\nlook\tthere"), "STATUS=in doubt: look there\n");
    }

    #[test]
    fn a_migration_has_a_status_once_its_memory_is_known() {
        let mut now = Statistics::default();
        assert_eq!(words(&now), None);
        (now.status, now.total, now.remaining) = (ramwire::observe::Status::PreSwitchover, 4 << 20, 1 << 20);
        assert_eq!(words(&now).unwrap(), "pre-switchover: 3.00 MiB of 4.00 MiB, 0 B/s");
    }

    #[test]
    fn a_manager_listens_at_a_path_or_an_abstract_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("ramwire-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (place, manager) in [
            (path.clone().into_os_string(), UnixDatagram::bind(&path).unwrap()),
            (format!("@{name}").into(), UnixDatagram::bind_addr(&abstract_name).unwrap()),
        ] {
            let socket = UnixDatagram::unbound().unwrap();
            socket.send_to_addr(b"READY=1\n", &address(&place).unwrap()).unwrap();
            let mut come = [0; 20];
            let got = manager.recv(&mut come).unwrap();
            assert_eq!(&come[..got], b"READY=1\n");
        }
        assert!(address(OsStr::new("vsock:2:1234")).is_none() && address(OsStr::new("")).is_none());
    }
}
