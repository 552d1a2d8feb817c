//! The answering end of a measurement: a process of its own, on this host or another.

use std::net::{TcpListener, ToSocketAddrs};

use super::super::BenchError;
use super::messages::{MessageStream, ProbeTransport, Reply, Request, failed};
use super::sockets;
use crate::cli::output::result_line;

/// Waits at `address` (HOST:PORT) for one asking end and answers it until it closes. Prints its address on standard
/// output.
///
/// # Errors
/// [`BenchError`].
pub fn serve(address: &str, host: Option<&str>) -> Result<(), BenchError> {
    let address = address.to_socket_addrs().map_err(failed("looking up the address"))?.next();
    let address =
        address.ok_or_else(|| failed("looking up the address")(std::io::ErrorKind::NotFound.into()))?;
    let listener = TcpListener::bind(address).map_err(failed("listening"))?;
    result_line!("listening {}", listener.local_addr().map_err(failed("listening"))?);
    let (socket, _) = listener.accept().map_err(failed("accepting"))?;
    answer_all(&mut MessageStream::new(socket).map_err(failed("accepting"))?, host)
}

/// Answers one request after the other.
///
/// # Errors
/// [`BenchError`] if the connection for messages broke. The error of a single measurement is sent to the other end.
pub fn answer_all(messages: &mut MessageStream, host: Option<&str>) -> Result<(), BenchError> {
    loop {
        messages.wait_for_more();
        let request: Request = match messages.receive()? {
            Some(ToAnswer::Measure(request)) => request,
            Some(ToAnswer::Done) => continue,
            None => return Ok(()),
        };
        let answered = match request.carrier {
            _ if !request.is_sound() => Err(BenchError::Refused {
                who: "the other end".into(),
                what: "a measurement".into(),
                answer: format!("{request:?} is beyond this program's limits"),
            }),
            #[cfg(feature = "rdma")]
            ProbeTransport::Rdma => super::verbs::answer(messages, &request, host),
            #[cfg(not(feature = "rdma"))]
            ProbeTransport::Rdma => {
                let _ = host;
                Err(BenchError::NoRdma(Box::new(ramwire::transport::WhyNoRdma::NotBuilt)))
            }
            ProbeTransport::Tcp | ProbeTransport::Unix => sockets::answer(messages, &request),
        };
        if let Err(error) = answered {
            messages.say(&Reply::No(crate::cli::remedies::in_words(&error)))?;
        }
    }
}

/// A message of the asking end.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToAnswer {
    /// The next measurement.
    Measure(Request),
    /// The current measurement is over.
    Done,
}
