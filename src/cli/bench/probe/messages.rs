//! The messages between the two ends of a measurement: one JSON value per line over a TCP connection of its own.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::super::BenchError;

/// Longest silence of the other end.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest line.
const MAX_LINE: u64 = 4096;
/// Largest message of a measurement.
pub const MAX_BYTES: usize = 64 << 20;
/// Maximum number of outstanding requests.
pub const MAX_REQUESTS: usize = 1024;

/// The transport of the measured messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeTransport {
    /// TCP
    Tcp,
    /// A UNIX socket, on one host
    Unix,
    /// A verbs device
    Rdma,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Op {
    /// RDMA WRITE there and back, each end watching the last byte; half the round trip
    Write,
    /// RDMA WRITE until its completion
    WriteComplete,
    /// RDMA READ until its completion
    Read,
    /// Messages there and back; half the round trip. The only one over sockets
    Send,
}

/// Whether single messages are measured or a flow of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// There and back, or one after the other.
    Latency,
    /// As many as there may be.
    Bandwidth,
}

/// One measurement, as the asking end wants it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// By what.
    pub carrier: ProbeTransport,
    /// What.
    pub op: Op,
    /// Of which kind.
    pub kind: Kind,
    /// Bytes of a message.
    pub size: usize,
    /// Requests on the way at a time.
    pub depth: usize,
}

impl Request {
    /// True if messages are echoed.
    pub fn is_echo(&self) -> bool {
        self.kind == Kind::Latency && matches!(self.op, Op::Write | Op::Send)
    }

    /// True if the sizes are within what this program allocates.
    pub fn is_sound(&self) -> bool {
        (1..=MAX_BYTES).contains(&self.size) && (1..=MAX_REQUESTS).contains(&self.depth)
    }
}

/// A message of the answering end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It waits at this address: an IP address or, for a UNIX socket, a path with port 0.
    At(String, u16),
    /// It is connected and continues as requested.
    Ready,
    /// It can't.
    No(String),
}

/// The connection for these messages.
#[derive(Debug)]
pub struct MessageStream {
    lines: BufReader<TcpStream>,
}

impl MessageStream {
    /// Takes over a connection.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self { lines: BufReader::new(socket) })
    }

    /// Sends one value.
    ///
    /// # Errors
    /// [`BenchError::Io`].
    pub fn say(&mut self, what: &impl Serialize) -> Result<(), BenchError> {
        let mut line = serde_json::to_string(what).map_err(|error| failed("speaking")(error.into()))?;
        line.push('\n');
        self.lines.get_mut().write_all(line.as_bytes()).map_err(failed("speaking"))
    }

    /// Receives one value; `None` once the other end has closed.
    ///
    /// # Errors
    /// [`BenchError::Io`].
    pub fn receive<T: DeserializeOwned>(&mut self) -> Result<Option<T>, BenchError> {
        let mut line = String::new();
        let count = (&mut self.lines).take(MAX_LINE).read_line(&mut line).map_err(failed("listening"))?;
        if count == 0 {
            return Ok(None);
        }
        serde_json::from_str(&line).map(Some).map_err(|error| failed("listening")(error.into()))
    }

    /// True if the other end has sent more, or is gone.
    #[cfg(any(feature = "rdma", test))]
    pub fn has_more(&self) -> bool {
        let socket = self.lines.get_ref();
        if !self.lines.buffer().is_empty() || socket.set_nonblocking(true).is_err() {
            return true;
        }
        let waiting =
            matches!(socket.peek(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        socket.set_nonblocking(false).is_err() || !waiting
    }

    /// Waits until the other end sends more or is gone, without a time limit.
    pub fn wait_for_more(&self) {
        while self.lines.buffer().is_empty() {
            match self.lines.get_ref().peek(&mut [0]) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                }
                _ => return,
            }
        }
    }

    /// The own end's address.
    ///
    /// # Errors
    /// [`BenchError::Io`].
    pub fn local_ip(&self) -> Result<IpAddr, BenchError> {
        Ok(self.lines.get_ref().local_addr().map_err(failed("looking at the connection"))?.ip())
    }
}

/// An error of either end.
pub fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the measurement".into(), doing, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn words_arrive_as_they_were_said_and_nonsense_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut here =
            MessageStream::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap()).unwrap();
        let mut there = MessageStream::new(listener.accept().unwrap().0).unwrap();
        let request = Request {
            carrier: ProbeTransport::Rdma,
            op: Op::WriteComplete,
            kind: Kind::Latency,
            size: 1,
            depth: 2,
        };
        assert!(!there.has_more());
        here.say(&request).unwrap();
        here.say(&Reply::At("10.9.0.1".into(), 7)).unwrap();
        assert_eq!(there.receive::<Request>().unwrap(), Some(request.clone()));
        assert!(there.has_more());
        assert_eq!(there.receive::<Reply>().unwrap(), Some(Reply::At("10.9.0.1".into(), 7)));
        here.say(&7).unwrap();
        assert!(there.receive::<Reply>().is_err());
        drop(here);
        assert_eq!(there.receive::<Reply>().unwrap(), None);
        for (size, depth) in [(0, 1), (MAX_BYTES + 1, 1), (1, 0), (1, MAX_REQUESTS + 1)] {
            assert!(!Request { size, depth, ..request.clone() }.is_sound());
        }
    }
}
