//! QEMU's machine protocol, as far as a migration needs it: one JSON value per line in each direction.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use ramwire::sys::{RecvPart, SendPart, Stop};
use ramwire::transport::{Address, ByteSink, ByteSource, StreamChannel, StreamOptions, connect};
use serde_json::{Value, json};

use crate::BenchError;

/// Longest time until a QEMU answers; it populates its memory before the first answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest line: an answer of any command used here is far shorter.
const MAX_LINE: usize = 1 << 20;

/// A connection to a QEMU's monitor.
#[derive(Debug)]
pub struct Monitor {
    channel: StreamChannel,
    who: String,
    /// Bytes read and not yet parsed.
    pending: Vec<u8>,
}

impl Monitor {
    /// Connects to the socket at `path`, which the QEMU creates once it runs, and makes the handshake. `alive` returns
    /// whether that QEMU still runs.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn open(path: &Path, who: &str, mut alive: impl FnMut() -> bool) -> Result<Self, BenchError> {
        let stop = Stop::never().within(ANSWER_TIMEOUT);
        let mut options = StreamOptions::default();
        options.stall = Some(ANSWER_TIMEOUT);
        let address = Address::unix(path);
        let channel = loop {
            match connect(&address, &options, &stop) {
                Ok(channel) => break channel,
                Err(_) if stop.reason().is_none() && alive() => {
                    stop.sleep(Duration::from_millis(20));
                }
                Err(error) => return Err(error.into()),
            }
        };
        let mut monitor = Self { channel, who: who.to_owned(), pending: Vec::new() };
        monitor.read(&stop)?;
        monitor.call("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command; returns its answer without the envelope.
    ///
    /// # Errors
    /// [`BenchError::Refused`] with QEMU's reason.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value, BenchError> {
        let stop = Stop::never().within(ANSWER_TIMEOUT);
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.channel.send(&[SendPart::Own(line.as_bytes())], &stop)?;
        loop {
            let mut answer = self.read(&stop)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                let answer = error["desc"].as_str().unwrap_or_default().to_owned();
                return Err(BenchError::Refused { who: self.who.clone(), what: command.to_owned(), answer });
            }
            // Anything else is an event.
        }
    }

    /// Polls until the migration's state shows that it is over; returns the whole state.
    ///
    /// # Errors
    /// [`BenchError::Refused`] if the migration failed.
    pub fn await_migration(&mut self, limit: Duration) -> Result<Value, BenchError> {
        let begun = Instant::now();
        loop {
            let state = self.call("query-migrate", json!({}))?;
            let refused = |answer: &str| BenchError::Refused {
                who: self.who.clone(),
                what: "migration".into(),
                answer: answer.to_owned(),
            };
            match state["status"].as_str() {
                Some("completed") => return Ok(state),
                Some(status @ ("failed" | "cancelled")) => {
                    return Err(refused(state["error-desc"].as_str().unwrap_or(status)));
                }
                _ if begun.elapsed() > limit => return Err(refused("it does not end")),
                _ => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn read(&mut self, stop: &Stop) -> Result<Value, BenchError> {
        let broken = |what: &str| BenchError::Io {
            who: self.who.clone(),
            doing: "reading its monitor",
            source: io::Error::new(io::ErrorKind::InvalidData, what),
        };
        loop {
            if let Some(end) = self.pending.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                return serde_json::from_slice(&line).map_err(|error| broken(&error.to_string()));
            }
            if self.pending.len() > MAX_LINE {
                return Err(broken("a line without end"));
            }
            let mut room = [0; 4096];
            let count = self.channel.recv(&mut [RecvPart::Own(&mut room)], stop)?;
            if count == 0 {
                return Err(broken("it ended; see its log above"));
            }
            self.pending.extend_from_slice(&room[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;

    #[test]
    fn answers_are_told_from_events_and_errors_have_their_reason() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            let mut lines = BufReader::new(socket.try_clone().unwrap()).lines();
            socket.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            for answer in [
                "{\"return\": {}}\r\n",
                "{\"event\": \"STOP\"}\r\n{\"return\": {\"status\": \"setup\"}}\r\n",
                "{\"return\": {\"status\": \"failed\", \"error-desc\": \"no room\"}}\r\n",
                "{\"error\": {\"class\": \"GenericError\", \"desc\": \"not so\"}}\r\n",
            ] {
                lines.next().unwrap().unwrap();
                socket.write_all(answer.as_bytes()).unwrap();
            }
        });
        let mut monitor = Monitor::open(&path, "qemu", || true).unwrap();
        let failed = monitor.await_migration(Duration::from_secs(5)).unwrap_err();
        assert!(failed.to_string().contains("no room"), "{failed}");
        let error = monitor.call("stop", json!({})).unwrap_err();
        assert!(error.to_string().contains("not so"), "{error}");
        server.join().unwrap();
        assert!(monitor.call("stop", json!({})).is_err());
    }
}
