//! `--metrics`: the figures of a running migration for a Prometheus server.
//!
//! One thread answers one connection at a time, each within [`ANSWER`] and from a head of at most [`MAX_HEAD`] bytes.
//! It only reads the figures, so a client can't affect the migration.

mod families;

pub(super) use families::{Out, encoded};

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::observe::SharedStatistics;
use ramwire::sys::{CancelToken, Stop};
use rustix::event::PollFlags;

use super::output::note;

/// Longest time that one client may delay the others.
const ANSWER: Duration = Duration::from_secs(2);

/// Maximum length of a request in bytes; a Prometheus server sends some 300.
const MAX_HEAD: usize = 8192;

/// Maximum number of header lines of a request.
const MAX_HEADERS: usize = 64;

/// Rest after a failed accept, for example if no descriptor is left.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Answers the figures as they are now, as OpenMetrics text.
pub(super) type Figures = Box<dyn Fn() -> Result<String, std::fmt::Error> + Send>;

/// The figures, as they are asked for.
type Ask<'a> = &'a dyn Fn() -> Result<String, std::fmt::Error>;

/// The option.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct MetricsArgs {
    /// Serve figures for Prometheus at http://HOST:PORT/metrics; a PORT alone is on the loopback, port 0 any free one.
    /// Any client that can connect can read them
    #[arg(long, value_name = "[HOST:]PORT", value_parser = place)]
    metrics: Option<String>,
}

impl MetricsArgs {
    /// Serves `statistics` if configured, until the returned value is dropped; prints the address on standard error.
    pub(super) fn serve(
        &self,
        command: &str,
        statistics: SharedStatistics,
    ) -> Result<Option<Metrics>, String> {
        self.serve_text(command, Box::new(move || families::text(&statistics.snapshot())))
    }

    /// As [`serve`](Self::serve), of figures of another kind.
    pub(super) fn serve_text(&self, command: &str, figures: Figures) -> Result<Option<Metrics>, String> {
        let Some(place) = &self.metrics else { return Ok(None) };
        let failed = |error: io::Error| {
            format!("--metrics {place}: {error}; name an address of this host and a free port")
        };
        let listener = bind(place).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let cancel = CancelToken::default();
        let stop = Stop::on(&cancel);
        let serve = move || serve(&listener, &*figures, &stop);
        let thread =
            std::thread::Builder::new().name("ramwire-metrics".into()).spawn(serve).map_err(failed)?;
        note!("ramwire {command}: metrics at http://{address}/metrics");
        Ok(Some(Metrics { cancel, thread: Some(thread) }))
    }
}

/// A port, or HOST:PORT.
fn place(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let is_host = !host.contains(':') || host.starts_with('[') && host.ends_with(']');
    match port.parse::<u16>() {
        Ok(_) if is_host => Ok(text.to_owned()),
        _ => Err(format!("{text:?} is neither HOST:PORT nor a port up to 65535")),
    }
}

fn bind(place: &str) -> io::Result<TcpListener> {
    let port_alone = place.strip_prefix(':').unwrap_or(place).parse::<u16>();
    let addresses: Vec<SocketAddr> = match port_alone {
        Ok(port) => vec![(Ipv4Addr::LOCALHOST, port).into()],
        Err(_) => place.to_socket_addrs()?.collect(),
    };
    TcpListener::bind(&addresses[..])
}

/// Serves until it is dropped.
pub(super) struct Metrics {
    cancel: CancelToken,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Metrics {
    fn drop(&mut self) {
        self.cancel.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, figures: Ask<'_>, stop: &Stop) {
    while let Ok(None) = stop.wait(listener.as_fd(), PollFlags::IN) {
        let answered = match listener.accept() {
            Ok((mut client, _)) => answer(&mut client, figures, &stop.within(ANSWER)),
            Err(error) => {
                stop.sleep(RETRY_INTERVAL);
                Err(error)
            }
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "a client of the metrics was not answered");
        }
    }
}

/// What is answered.
struct Reply {
    status: &'static str,
    kind: &'static str,
    body: String,
    /// A HEAD gets no body.
    head_only: bool,
}

impl Reply {
    fn of_error(status: &'static str) -> Self {
        let body = format!("{status}; the figures are at /metrics\n");
        Self { status, kind: "text/plain; charset=utf-8", body, head_only: false }
    }
}

fn answer(client: &mut TcpStream, figures: Ask<'_>, stop: &Stop) -> io::Result<()> {
    client.set_nonblocking(true)?;
    let Reply { status, kind, body, head_only } = reply_to(&head_of(client, stop)?, figures);
    let allow = if status.starts_with("405") { "Allow: GET, HEAD\r\n" } else { "" };
    let mut out = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        body.len()
    );
    if !head_only {
        out.push_str(&body);
    }
    let mut left = out.as_bytes();
    while !left.is_empty() {
        wait(client, PollFlags::OUT, stop)?;
        match client.write(left) {
            Ok(written) => left = &left[written..],
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    client.shutdown(std::net::Shutdown::Write)
}

/// The request up to its empty line, or up to the limit.
fn head_of(client: &mut TcpStream, stop: &Stop) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut part = [0; 1024];
    while !head.windows(4).any(|end| end == b"\r\n\r\n") && head.len() <= MAX_HEAD {
        wait(client, PollFlags::IN, stop)?;
        match client.read(&mut part) {
            Ok(0) => break,
            Ok(got) => head.extend_from_slice(&part[..got]),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(head)
}

fn wait(client: &TcpStream, what: PollFlags, stop: &Stop) -> io::Result<()> {
    match stop.wait(client.as_fd(), what)? {
        None => Ok(()),
        Some(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn reply_to(head: &[u8], figures: Ask<'_>) -> Reply {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if head.len() > MAX_HEAD => {
            return Reply::of_error("431 Request Header Fields Too Large");
        }
        Err(httparse::Error::TooManyHeaders) => {
            return Reply::of_error("431 Request Header Fields Too Large");
        }
        _ => return Reply::of_error("400 Bad Request"),
    }
    let head_only = request.method == Some("HEAD");
    if !head_only && request.method != Some("GET") {
        return Reply::of_error("405 Method Not Allowed");
    }
    let path = request.path.unwrap_or_default().split('?').next();
    let reply = match (path, figures()) {
        (Some("/metrics"), Ok(body)) => {
            Reply { status: "200 OK", kind: families::CONTENT_TYPE, body, head_only }
        }
        (Some("/metrics"), Err(_)) => Reply::of_error("500 Internal Server Error"),
        _ => Reply::of_error("404 Not Found"),
    };
    Reply { head_only, ..reply }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn none() -> Result<String, std::fmt::Error> {
        families::text(&SharedStatistics::default().snapshot())
    }

    fn status(request: &[u8]) -> &'static str {
        reply_to(request, &none).status
    }

    #[test]
    fn only_whole_small_requests_for_the_figures_get_them() {
        assert_eq!(status(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n"), "200 OK");
        assert_eq!(status(b"GET /metrics?x=1 HTTP/1.0\r\n\r\n"), "200 OK");
        assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), "404 Not Found");
        assert_eq!(status(b"POST /metrics HTTP/1.1\r\n\r\n"), "405 Method Not Allowed");
        for wrong in [
            &b""[..],
            b"\r\n\r\n",
            b"GET /metrics\r\n\r\n",
            b"\x16\x03\x01\x02",
            b"GET /metrics HTTP/1.1\r\n",
        ] {
            assert_eq!(status(wrong), "400 Bad Request", "{wrong:?}");
        }
        let long = [&b"GET /metrics HTTP/1.1\r\nA: "[..], &[b'x'; MAX_HEAD]].concat();
        assert_eq!(status(&long), "431 Request Header Fields Too Large");
        let many =
            [&b"GET /metrics HTTP/1.1\r\n"[..], &b"A: x\r\n".repeat(MAX_HEADERS + 1), b"\r\n"].concat();
        assert_eq!(status(&many), "431 Request Header Fields Too Large");
        assert!(reply_to(b"HEAD /metrics HTTP/1.1\r\n\r\n", &none).head_only);
    }

    #[test]
    fn a_port_alone_is_on_the_loopback() {
        for place in ["0", ":0", "127.0.0.1:0", "localhost:0"] {
            let address = bind(place).and_then(|listener| listener.local_addr());
            assert!(address.as_ref().is_ok_and(|address| address.ip().is_loopback()), "{place}: {address:?}");
        }
        for wrong in ["", "70000", "localhost", "1.2.3.4:x", "192.0.2.1:0"] {
            assert!(bind(wrong).is_err(), "{wrong}");
        }
    }
}
