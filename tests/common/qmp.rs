//! A client of QEMU's monitor protocol over a unix socket.

use std::{
    io::{self, BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};

/// How long one command may take, be the machine emulated.
const ANSWER: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("{command}: refused: {reason}")]
    Refused { command: String, reason: String },
    #[error("{command}: the monitor is gone")]
    Channel {
        command: String,
        #[source]
        source: io::Error,
    },
}

pub(crate) struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that arrived while waiting for answers, oldest first.
    pub(crate) events: Vec<Value>,
}

impl Qmp {
    /// Connects and completes the capability negotiation.
    pub(crate) fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        let mut qmp = Self { stream: BufReader::new(stream), events: vec![] };
        qmp.receive()?; // greeting
        qmp.execute("qmp_capabilities", json!({})).map_err(io::Error::other)?;
        Ok(qmp)
    }

    /// Runs a command; returns its result.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        let channel = |source| QmpError::Channel { command: command.to_owned(), source };
        let request = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.stream.get_mut().write_all(request.as_bytes()).map_err(channel)?;
        loop {
            let mut answer = self.receive().map_err(channel)?;
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if let Some(error) = answer.get("error") {
                let reason = error["desc"].as_str().unwrap_or("no reason").to_owned();
                return Err(QmpError::Refused { command: command.to_owned(), reason });
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for an event that `wanted` accepts, which may have arrived before; returns its data.
    pub(crate) fn wait_event(&mut self, name: &str, wanted: impl Fn(&Value) -> bool) -> io::Result<Value> {
        let is_it = |event: &&Value| event["event"] == name && wanted(&event["data"]);
        loop {
            if let Some(event) = self.events.iter().find(is_it) {
                return Ok(event["data"].clone());
            }
            let next = self.receive()?;
            self.events.push(next);
        }
    }

    fn receive(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        match self.stream.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(serde_json::from_str(&line)?),
        }
    }
}
