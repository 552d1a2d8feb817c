//! Messages of a guardian: to standard error and to the system's log, if anything reads them.

use std::io::Write;
use std::os::unix::net::UnixDatagram;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where syslog and journald listen.
const LOG: &str = "/dev/log";

/// Facility user, severity alert (RFC 5424).
const PRIORITY: u8 = 8 + 1;

/// What an operator does while the guest is in doubt, and `process` waits for the far end's answer. `switched`: the
/// source has switched to postcopy.
pub(in crate::cli) fn advice(switched: bool, process: u32) -> String {
    let never = format!("if it does not and never will, `kill -USR1 {process}`: the source then goes on");
    if switched {
        format!(
            "End neither end by yourself: what the guest misses at the far end is only at its source. Look at the far \
             end: if the guest runs there, keep both; {never}"
        )
    } else {
        format!("Look at the far end: if the guest runs there, end the source; {never}")
    }
}

/// Writes a line to both. It never waits for a reader: this process must keep the connections.
pub(super) fn say(text: &str) {
    let line = format!("ramwire relay: {text}\n");
    let mut errors = std::io::stderr().lock();
    let mut fds = [PollFd::new(&errors, PollFlags::OUT)];
    let has_room = poll(&mut fds, Some(&Timespec::default())).is_ok_and(|ready| ready > 0);
    if has_room && !fds[0].revents().intersects(PollFlags::ERR | PollFlags::NVAL) {
        // A pipe with room takes 4096 bytes at once (pipe(7)).
        let _ = errors.write_all(line.as_bytes());
    }
    let Ok(log) = UnixDatagram::unbound() else { return };
    let pid = std::process::id();
    let entry = format!("<{PRIORITY}>ramwire[{pid}]: {text}");
    if log.set_nonblocking(true).is_ok() {
        // On a host without a log only standard error is used.
        let _ = log.send_to(entry.as_bytes(), LOG);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_that_has_what_the_far_end_misses_is_not_to_be_ended() {
        let (precopy, postcopy) = (advice(false, 7), advice(true, 7));
        assert!(precopy.contains("end the source") && precopy.contains("kill -USR1 7"));
        assert!(!postcopy.contains("end the source") && postcopy.contains("keep both"));
        assert!(postcopy.contains("kill -USR1 7"));
    }
}
