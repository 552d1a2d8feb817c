//! A client of the monitor protocol: ramwire's monitor and QEMU's.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

use super::super::qmp::{Framing, Place};

/// How long a monitor may take for an answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Why a command was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("{place} can't be reached; is the process there, and has it a monitor")]
    Unreachable { place: Place, source: io::Error },
    #[error("{place} is no monitor: it answers {said}")]
    NoMonitor { place: Place, said: String },
    #[error("{0} does not answer: a QEMU's monitor serves one client at a time; end the other one")]
    Busy(Place),
    #[error("{command} was refused: {why}")]
    Refused { command: String, why: String },
    #[error("the monitor closed the connection")]
    Closed,
    #[error("the monitor did not answer")]
    Io(#[from] io::Error),
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A connection after the negotiation.
pub(super) struct Client {
    stream: Box<dyn Stream>,
    framing: Framing,
    input: Vec<u8>,
    /// Events that arrived while waiting for an answer, oldest first.
    events: Vec<Value>,
    out_of_band: bool,
    commands: u64,
}

impl Client {
    /// Connects and negotiates.
    pub(super) fn connect(place: &Place) -> Result<Self, ClientError> {
        let stream =
            open(place).map_err(|source| ClientError::Unreachable { place: place.clone(), source })?;
        let (framing, input, events) = Default::default();
        let mut client = Self { stream, framing, input, events, out_of_band: false, commands: 0 };
        let greeting = client.read().map_err(|error| match error {
            ClientError::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
                ClientError::Busy(place.clone())
            }
            other => other,
        })?;
        let Some(abilities) = greeting["QMP"]["capabilities"].as_array() else {
            let said = greeting["error"]["desc"].as_str().map_or_else(|| greeting.to_string(), str::to_owned);
            return Err(ClientError::NoMonitor { place: place.clone(), said });
        };
        client.out_of_band = abilities.iter().any(|ability| ability == "oob");
        let enable = if client.out_of_band { json!({"enable": ["oob"]}) } else { json!({}) };
        client.execute("qmp_capabilities", &enable)?;
        Ok(client)
    }

    /// Runs a command; returns its result.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, ClientError> {
        self.send("execute", command, arguments)
    }

    /// The same, before other commands that the monitor has not run yet, if it can.
    pub(super) fn execute_first(&mut self, command: &str, arguments: &Value) -> Result<Value, ClientError> {
        self.send(if self.out_of_band { "exec-oob" } else { "execute" }, command, arguments)
    }

    /// Events that have arrived so far; each is returned once.
    pub(super) fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    fn send(&mut self, how: &str, command: &str, arguments: &Value) -> Result<Value, ClientError> {
        self.commands += 1;
        let id = json!(self.commands);
        let request = json!({how: command, "arguments": arguments, "id": id});
        let sent = self.stream.write_all(format!("{request}\n").as_bytes());
        // A monitor that has closed may have sent the reason, or the result, before.
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
        if let Err(error) = sent
            && !gone(&error)
        {
            return Err(error.into());
        }
        loop {
            let mut answer = self.read()?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if answer["id"] == id {
                return match answer.get("error") {
                    None => Ok(answer["return"].take()),
                    Some(error) => {
                        let why = error["desc"].as_str().unwrap_or("no reason").to_owned();
                        Err(ClientError::Refused { command: command.to_owned(), why })
                    }
                };
            }
        }
    }

    fn read(&mut self) -> Result<Value, ClientError> {
        loop {
            let mut left = &self.input[..];
            let found = self.framing.next(&mut left);
            let taken = self.input.len() - left.len();
            self.input.drain(..taken);
            if let Some(found) = found {
                return found.map_err(|damage| io::Error::new(io::ErrorKind::InvalidData, damage).into());
            }
            let mut part = [0; 4096];
            match self.stream.read(&mut part) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(got) => self.input.extend_from_slice(&part[..got]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(ClientError::Closed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let text = format!("nothing came for {} s", ANSWER.as_secs());
                    return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn open(place: &Place) -> io::Result<Box<dyn Stream>> {
    match place {
        Place::Unix(path) => {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.set_write_timeout(Some(ANSWER))?;
            Ok(Box::new(stream))
        }
        Place::Tcp(place) => {
            let stream = TcpStream::connect(place)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.set_write_timeout(Some(ANSWER))?;
            Ok(Box::new(stream))
        }
    }
}
