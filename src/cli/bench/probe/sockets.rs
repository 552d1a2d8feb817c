//! Messages over TCP and UNIX sockets.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::BenchError;
use super::measure::{Echo, Flow};
use super::messages::{ANSWER_TIMEOUT, MessageStream, ProbeTransport, Reply, Request, failed};

/// A stream socket of either kind.
trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// The asking end.
pub struct Sockets {
    stream: Box<dyn Stream>,
    message: Vec<u8>,
    posted: usize,
}

impl Sockets {
    /// Connects to the address where the other end waits.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn connect(request: &Request, host: &str, port: u16) -> Result<Self, BenchError> {
        let stream: io::Result<Box<dyn Stream>> = match request.carrier {
            ProbeTransport::Unix => UnixStream::connect(host).and_then(unix),
            _ => TcpStream::connect((host, port)).and_then(tcp),
        };
        let stream = stream.map_err(failed("connecting"))?;
        Ok(Self { stream, message: vec![0x5a; request.size], posted: 0 })
    }
}

fn tcp(socket: TcpStream) -> io::Result<Box<dyn Stream>> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(Box::new(socket))
}

fn unix(socket: UnixStream) -> io::Result<Box<dyn Stream>> {
    socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(Box::new(socket))
}

impl Echo for Sockets {
    fn exchange(&mut self) -> Result<(), BenchError> {
        self.stream.write_all(&self.message).map_err(failed("sending"))?;
        self.stream.read_exact(&mut self.message).map_err(failed("receiving"))
    }
}

/// A socket reports when it has accepted the bytes, not when they have arrived.
impl Flow for Sockets {
    fn post(&mut self) -> Result<(), BenchError> {
        self.stream.write_all(&self.message).map_err(failed("sending"))?;
        self.posted += 1;
        Ok(())
    }

    fn completed(&mut self) -> Result<usize, BenchError> {
        Ok(std::mem::take(&mut self.posted))
    }

    /// A last message of ones is answered once all earlier messages have been read.
    fn settle(&mut self) -> Result<(), BenchError> {
        self.message.fill(0xff);
        self.stream.write_all(&self.message).map_err(failed("sending"))?;
        self.stream.read_exact(&mut [0]).map_err(failed("receiving"))
    }
}

/// The path of a UNIX socket, removed with this value.
struct Place(PathBuf);

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The answering end: waits, connects, and answers until the other closes.
///
/// # Errors
/// [`BenchError`].
pub fn answer(messages: &mut MessageStream, request: &Request) -> Result<(), BenchError> {
    let mut stream = match request.carrier {
        ProbeTransport::Unix => {
            static NUMBER: AtomicU32 = AtomicU32::new(0);
            let name = format!(
                "ramwire-bench-{}-{}.socket",
                std::process::id(),
                NUMBER.fetch_add(1, Ordering::Relaxed)
            );
            let place = Place(std::env::temp_dir().join(name));
            let listener = UnixListener::bind(&place.0).map_err(failed("listening"))?;
            messages.say(&Reply::At(place.0.display().to_string(), 0))?;
            listener.accept().and_then(|(socket, _)| unix(socket)).map_err(failed("accepting"))?
        }
        _ => {
            let ip: IpAddr = messages.local_ip()?;
            let listener = TcpListener::bind((ip, 0)).map_err(failed("listening"))?;
            let port = listener.local_addr().map_err(failed("listening"))?.port();
            messages.say(&Reply::At(ip.to_string(), port))?;
            listener.accept().and_then(|(socket, _)| tcp(socket)).map_err(failed("accepting"))?
        }
    };
    messages.say(&Reply::Ready)?;
    let mut message = vec![0; request.size];
    loop {
        match stream.read_exact(&mut message) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read.map_err(failed("receiving"))?,
        }
        if request.is_echo() {
            stream.write_all(&message).map_err(failed("sending"))?;
        } else if message.iter().all(|byte| *byte == 0xff) {
            stream.write_all(&[0]).map_err(failed("sending"))?;
        }
    }
}
