//! Connections after the first, of which nobody has said whose they are.
//!
//! # Required order
//!
//! Nothing is read of a connection before it is known what it begins with: its first bytes are looked at where they lie.
//! So no connection delays another, and those that say nothing, or not enough, are bounded in number.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::stream::qemu::section::COMMAND;
use crate::sys::{Lock as _, Stop, duplicate};
use crate::transport::{ByteSource, ChannelError, OpenError, StreamChannel};

use super::recovery::NextConnection;

/// Interval between two checks for another connection while one is silent, and the length of each check.
const NEXT_CHECK_INTERVAL: Duration = Duration::from_millis(20);
const NEXT_CHECK_TIME: Duration = Duration::from_millis(1);
/// Interval between two looks at a connection whose first bytes are not complete: bytes that lie there end no wait.
const BEGUN_CHECK_INTERVAL: Duration = Duration::from_millis(5);
/// How long a connection may take from its first byte to all that it has to begin with.
const SPEAK_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of connections that are kept while they say nothing, or not enough.
const MAX_SILENT: usize = 8;

/// Source of the connections after the first: one thread has it at a time.
#[derive(Clone, Default)]
pub(super) struct SharedNext(Arc<Next>);

#[derive(Default)]
struct Next {
    slot: Mutex<Option<Connections>>,
    /// There is one, and a thread may take it.
    there: AtomicBool,
}

impl SharedNext {
    /// Returns it; `None`: there is none any more.
    pub(super) fn put(&self, next: Option<Connections>) {
        self.0.there.store(next.is_some(), Ordering::Release);
        *self.0.slot.locked() = next;
    }

    pub(super) fn take(&self) -> Option<Connections> {
        self.0.slot.locked().take()
    }

    pub(super) fn is_there(&self) -> bool {
        self.0.there.load(Ordering::Acquire)
    }
}

/// The use of a connection, determined by its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// The stream continues here: a command.
    Main,
    /// Urgent pages.
    Urgent,
}

/// What the first bytes of a connection show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::session) enum Begins<T> {
    /// It is wanted, as this.
    As(T),
    /// No byte has come.
    NotYet,
    /// Bytes have come, and not all that are needed.
    InPart,
    /// It is of no use.
    Otherwise,
}

/// A connection that was not taken yet.
struct Arrival {
    channel: StreamChannel,
    since: Instant,
    /// Some of the bytes that are needed have come.
    begun: bool,
}

/// Connections after the first. A source that has lost one may leave others open, and strangers connect, too: so a
/// silent connection does not delay the next.
pub(in crate::session) struct Connections {
    next: Box<dyn NextConnection>,
    /// Oldest first.
    silent: Vec<Arrival>,
}

impl Connections {
    pub(in crate::session) fn new(next: Box<dyn NextConnection>) -> Self {
        Self { next, silent: Vec::new() }
    }

    /// Waits for a connection on which bytes have arrived. `watch` is called at each change with whether there is a
    /// silent one.
    ///
    /// # Errors
    /// No other connection is possible, or the stop.
    pub(super) fn first_with_data(
        &mut self,
        stop: &Stop,
        watch: impl Fn(bool),
    ) -> Result<(StreamChannel, Use), OpenError> {
        self.first_that(stop, watch, use_of)
    }

    /// Waits for the next connection, whatever it says.
    ///
    /// # Errors
    /// As [`first_with_data`](Self::first_with_data).
    pub(in crate::session) fn any(&mut self, stop: &Stop) -> Result<StreamChannel, OpenError> {
        match self.silent.is_empty() {
            true => self.next.next(stop),
            false => Ok(self.silent.remove(0).channel),
        }
    }

    /// Waits for a connection that begins as `judge` wants it. Those that begin otherwise are closed, and so is the one
    /// that came first of too many that wait.
    ///
    /// # Errors
    /// As [`first_with_data`](Self::first_with_data).
    pub(in crate::session) fn first_that<T>(
        &mut self,
        stop: &Stop,
        watch: impl Fn(bool),
        judge: impl Fn(&StreamChannel) -> Begins<T>,
    ) -> Result<(StreamChannel, T), OpenError> {
        loop {
            if let Some(wanted) = self.take_wanted(&judge) {
                return Ok(wanted);
            }
            watch(!self.silent.is_empty());
            if self.silent.is_empty() {
                let channel = self.next.next(stop)?;
                self.keep(channel);
                continue;
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: "waiting for another connection" }.into());
            }
            // Before any wait: also a short look takes what has come.
            if !self.accept_one(stop)? {
                self.wait(stop);
            }
        }
    }

    /// Takes the connections that have come, and waits for the first until the stop. Returns duplicates of their
    /// descriptors: none of them ends while these are open.
    pub(super) fn held(&mut self, stop: &Stop) -> Vec<OwnedFd> {
        while self.silent.len() < MAX_SILENT && stop.reason().is_none() {
            match self.accept_one(stop) {
                Ok(true) => {}
                Ok(false) if self.silent.is_empty() => {}
                // None can come, or all are here.
                _ => break,
            }
        }
        let descriptors = self.silent.iter().filter_map(|arrival| arrival.channel.descriptor());
        descriptors.filter_map(|descriptor| duplicate(&descriptor).ok()).collect()
    }

    /// Takes a connection that has come; false: none has.
    fn accept_one(&mut self, stop: &Stop) -> Result<bool, OpenError> {
        let brief = stop.within(NEXT_CHECK_TIME);
        match self.next.next(&brief) {
            Ok(channel) => self.keep(channel),
            Err(_) if brief.reason().is_some() => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(true)
    }

    fn keep(&mut self, channel: StreamChannel) {
        self.silent.push(Arrival { channel, since: Instant::now(), begun: false });
        if self.silent.len() > MAX_SILENT {
            let oldest = self.silent.remove(0);
            tracing::debug!(peer = oldest.channel.peer(), "a connection was closed that says too little");
        }
    }

    /// Until bytes have come on a silent connection, or it is time to look for others.
    fn wait(&self, stop: &Stop) {
        let begun = self.silent.iter().any(|arrival| arrival.begun);
        let silent = self.silent.iter().filter(|arrival| !arrival.begun);
        let fds: Vec<_> = silent.filter_map(|arrival| arrival.channel.descriptor()).collect();
        let interval = if begun { BEGUN_CHECK_INTERVAL } else { NEXT_CHECK_INTERVAL };
        // Whatever ends it is seen next.
        let _ = stop.within(interval).wait_any(&fds);
    }

    /// The first connection that begins as it should. Those that begin otherwise are dropped.
    fn take_wanted<T>(&mut self, judge: impl Fn(&StreamChannel) -> Begins<T>) -> Option<(StreamChannel, T)> {
        let mut at = 0;
        while let Some(arrival) = self.silent.get_mut(at) {
            let begins = judge(&arrival.channel);
            arrival.begun = matches!(begins, Begins::InPart);
            let found = match begins {
                Begins::NotYet => None,
                Begins::InPart if arrival.since.elapsed() < SPEAK_TIMEOUT => None,
                Begins::InPart | Begins::Otherwise => Some(None),
                Begins::As(found) => Some(Some(found)),
            };
            let Some(found) = found else {
                at += 1;
                continue;
            };
            let channel = self.silent.remove(at).channel;
            match found {
                Some(found) => return Some((channel, found)),
                None => tracing::debug!(peer = channel.peer(), "a connection that is of no use"),
            }
        }
        None
    }
}

/// What a connection is for, by its first byte.
fn use_of(channel: &StreamChannel) -> Begins<Use> {
    match first_bytes(channel, &mut [0]) {
        Begins::As([COMMAND, ..]) => Begins::As(Use::Main),
        Begins::As([0, ..]) => Begins::As(Use::Urgent),
        Begins::NotYet => Begins::NotYet,
        _ => Begins::Otherwise,
    }
}

/// The first bytes of a connection that have come, as many as `into` has room for; they stay to be read.
pub(in crate::session) fn first_bytes<'a>(channel: &StreamChannel, into: &'a mut [u8]) -> Begins<&'a [u8]> {
    match channel.peek(into) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Begins::NotYet,
        Err(_) | Ok(0) => Begins::Otherwise,
        Ok(count) => Begins::As(into.get(..count).unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::net::{SocketAddr, TcpStream};

    use super::*;
    use crate::transport::{Address, AllowList, Listener, StreamOptions};

    const WORD: &[u8] = b"word";

    fn word(channel: &StreamChannel) -> Begins<()> {
        let mut bytes = [0; WORD.len()];
        match first_bytes(channel, &mut bytes) {
            Begins::As(WORD) => Begins::As(()),
            Begins::As(come) if WORD.starts_with(come) => Begins::InPart,
            Begins::NotYet => Begins::NotYet,
            _ => Begins::Otherwise,
        }
    }

    fn listen() -> (SocketAddr, Connections) {
        let any: Address = "tcp:127.0.0.1:0".parse().unwrap();
        let mut listener = Listener::bind(&any, AllowList::default(), &Stop::never()).unwrap();
        let (host, port) = listener.address().host_and_port().unwrap();
        let address = format!("{host}:{port}").parse().unwrap();
        let next = move |stop: &Stop| listener.accept(&StreamOptions::default(), stop);
        (address, Connections::new(Box::new(next)))
    }

    fn say(address: SocketAddr, bytes: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// Whatever strangers are there, silent, slow or of another kind, and however many: the one that speaks is taken,
    /// also by looks that are shorter than any wait.
    #[test]
    fn strangers_keep_nobody_out() {
        for look in [Duration::from_millis(5), Duration::from_secs(100)] {
            let (address, mut connections) = listen();
            let words: [&[u8]; 4] = [b"", b"wo", b"x", b"wort"];
            let said = words.iter().cycle().take(5 * MAX_SILENT);
            let strangers: Vec<_> = said.map(|bytes| say(address, bytes)).collect();
            let source = say(address, WORD);
            let by = Instant::now() + Duration::from_secs(100);
            let taken = loop {
                match connections.first_that(&Stop::never().within(look), |_| {}, word) {
                    Ok((channel, ())) => break channel,
                    Err(error) => assert!(Instant::now() < by, "{error}"),
                }
            };
            assert_eq!(taken.peer(), format!("tcp:{}", source.local_addr().unwrap()), "{look:?}");
            assert!(connections.silent.len() <= MAX_SILENT);
            drop(strangers);
        }
    }

    #[test]
    fn a_wait_ends_with_its_stop_although_strangers_wait() {
        let (address, mut connections) = listen();
        let _strangers = [say(address, b""), say(address, b"wo")];
        let stop = Stop::never().within(Duration::from_millis(50));
        assert!(connections.first_that(&stop, |_| {}, word).is_err());
    }
}
