//! Connections that have been accepted but have not sent their first word.
//!
//! A port check, a health probe or a scanner connects, sends nothing or other bytes, and disconnects or stays. None of
//! them may take the place of the source or delay it. So all connections are held in parallel, and the first one that
//! begins like a migration is taken; its bytes are left to be read. The others are closed, and a warning gives the
//! reason.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::OpenError;
use crate::error::Remedy;
use crate::stream::qemu::{file, multifd};
use crate::sys::{Stop, StopReason};
use crate::transport::{ChannelError, StreamChannel, StreamOptions};

const ACCEPTING: &str = "waiting for a connection";

/// How long a connection may be silent if the options set no stall time. It does not block other connections meanwhile.
const SILENT: Duration = Duration::from_secs(30);

/// Time after which an incomplete first word is checked again: bytes that have already arrived wake no wait.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// Maximum number of silent connections, besides the expected ones.
const STRANGERS: usize = 16;

/// The first byte of a TLS handshake; the version follows.
const TLS_HANDSHAKE: u8 = 22;

/// First words of a main channel.
pub(crate) const MAIN: [u32; 1] = [file::MAGIC];
/// First word of a source that moves pages by RDMA, on its TLS connection.
pub(crate) const QUEUE_PAIRS: [u32; 1] = [u32::from_be_bytes(*b"RWQ1")];
/// First words of a source that has not said yet by which of both it comes.
#[cfg(all(feature = "rdma", feature = "tls"))]
pub(crate) const EITHER: [u32; 2] = [MAIN[0], QUEUE_PAIRS[0]];
/// First words of a main channel and of a page channel.
pub(crate) const MAIN_AND_PAGES: [u32; 2] = [file::MAGIC, multifd::MAGIC];

/// Sockets that are listened on.
pub(crate) trait Listening {
    /// The sockets.
    fn sockets(&self) -> Vec<BorrowedFd<'_>>;

    /// Where that is, for messages.
    fn place(&self) -> String;

    /// An incoming connection from an allowed host; does not wait.
    ///
    /// # Errors
    /// [`ChannelError::Io`].
    fn take(&self, options: &StreamOptions) -> Result<Option<StreamChannel>, ChannelError>;
}

/// Waits for the next connection, whatever it sends.
///
/// # Errors
/// [`ChannelError`].
pub(crate) fn accept(
    listening: &dyn Listening,
    options: &StreamOptions,
    stop: &Stop,
) -> Result<StreamChannel, ChannelError> {
    loop {
        wait(listening, &[], stop)?;
        if let Some(channel) = listening.take(options)? {
            return Ok(channel);
        }
    }
}

/// Waits until data or a connection arrives at a listening socket or at one of `others`.
fn wait(listening: &dyn Listening, others: &[BorrowedFd<'_>], stop: &Stop) -> Result<(), ChannelError> {
    let mut sockets = listening.sockets();
    sockets.extend_from_slice(others);
    let ended = stop.wait_any(&sockets).map_err(|source| ChannelError::Io {
        peer: listening.place(),
        doing: ACCEPTING,
        source,
    })?;
    ended.map_or(Ok(()), |reason| Err(ChannelError::Stopped { reason, doing: ACCEPTING }))
}

/// Maximum number of strangers that are reported individually: a scanner may send thousands.
const TOLD: u32 = 100;
const TOLD_LAST: u32 = TOLD + 1;

/// Receives a report of each connection that was closed, with the reason.
pub(crate) type TellFn = dyn Fn(&str) + Send + Sync;

/// Connections whose first word has not arrived yet.
#[derive(Default)]
pub(crate) struct Candidates {
    /// Oldest first.
    waiting: VecDeque<Candidate>,
    tell: Option<Arc<TellFn>>,
    told: u32,
}

impl std::fmt::Debug for Candidates {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidates").field("waiting", &self.waiting).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Candidate {
    channel: StreamChannel,
    since: Instant,
    /// Some bytes of the word have arrived.
    begun: bool,
}

/// Result of checking a connection.
enum Verdict {
    /// It begins with a wanted word.
    Wanted,
    /// Nothing yet, or a beginning.
    Open { begun: bool },
    /// It is not, and why.
    Stranger(String),
}

impl Candidates {
    /// Called for connections of strangers.
    pub(crate) fn tell(&mut self, tell: Arc<TellFn>) {
        self.tell = Some(tell);
    }

    /// True while some have not said what they are.
    pub(crate) fn are_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Gives up waiting for the first word of the connection that was silent longest.
    pub(crate) fn take_silent(&mut self) -> Option<StreamChannel> {
        self.waiting.pop_front().map(|candidate| candidate.channel)
    }

    /// Waits for a connection that begins with one of `wanted`. At most `expected` of these and a bounded number of
    /// others are held at a time; when there are too many, the one that was silent longest is closed.
    ///
    /// # Errors
    /// [`OpenError::Channel`].
    pub(crate) fn next(
        &mut self,
        listening: &dyn Listening,
        (wanted, expected): (&[u32], usize),
        options: &StreamOptions,
        stop: &Stop,
    ) -> Result<StreamChannel, OpenError> {
        let most = expected + STRANGERS;
        let silence_limit = options.stall.unwrap_or(SILENT);
        loop {
            // No more than fit: then the present ones are checked.
            for _ in 0..most {
                let Some(channel) = listening.take(options)? else { break };
                self.waiting.push_back(Candidate { channel, since: Instant::now(), begun: false });
            }
            if let Some(channel) = self.take_wanted(wanted) {
                return Ok(channel);
            }
            while self.waiting.len() > most
                || self.waiting.front().is_some_and(|oldest| oldest.since.elapsed() >= silence_limit)
            {
                let Some(oldest) = self.waiting.pop_front() else { break };
                let why = match oldest.channel.is_shaking_hands() {
                    true => "it has not finished its TLS handshake",
                    false => "it has not sent its first bytes",
                };
                self.dismiss(oldest.channel.peer(), why);
            }
            let silent: Vec<_> = self.waiting.iter().filter(|candidate| !candidate.begun).collect();
            let due = self.waiting.front().map(|oldest| silence_limit.saturating_sub(oldest.since.elapsed()));
            let due = if silent.len() < self.waiting.len() { Some(RETRY_INTERVAL) } else { due };
            let sockets: Vec<_> =
                silent.iter().map(|candidate| candidate.channel.end().0.fd.as_fd()).collect();
            match wait(listening, &sockets, &due.map_or_else(|| stop.clone(), |due| stop.within(due))) {
                Err(ChannelError::Stopped { reason: StopReason::Deadline, .. })
                    if stop.reason().is_none() => {}
                waited => waited?,
            }
        }
    }

    /// Reports why a connection is closed, before it is closed.
    pub(in crate::transport) fn dismiss(&mut self, peer: &str, why: &str) {
        self.told = self.told.saturating_add(1);
        let text = match self.told {
            0..=TOLD => format!("closed a connection from {peer}: {why}; still listening"),
            TOLD_LAST => format!("{TOLD} connections were not from a source; further ones are not reported"),
            _ => return,
        };
        tracing::warn!("{text}");
        if let Some(tell) = &self.tell {
            tell(&text);
        }
    }

    /// Checks all; returns the first that is wanted, and closes those that are not.
    fn take_wanted(&mut self, wanted: &[u32]) -> Option<StreamChannel> {
        let mut at = 0;
        while let Some(candidate) = self.waiting.get_mut(at) {
            match judge(&candidate.channel, wanted) {
                Verdict::Wanted => return self.waiting.remove(at).map(|candidate| candidate.channel),
                Verdict::Open { begun } => {
                    candidate.begun = begun;
                    at += 1;
                }
                Verdict::Stranger(why) => {
                    if let Some(candidate) = self.waiting.remove(at) {
                        self.dismiss(candidate.channel.peer(), &why);
                    }
                }
            }
        }
        None
    }
}

fn judge(channel: &StreamChannel, wanted: &[u32]) -> Verdict {
    let mut word = [0; 4];
    let fits = |come: &[u8]| wanted.iter().any(|wanted| wanted.to_be_bytes().starts_with(come));
    match channel.peek(&mut word) {
        Ok(0) => Verdict::Stranger("it closed without a byte".into()),
        Ok(4) if fits(&word) => Verdict::Wanted,
        Ok(4) if word == QUEUE_PAIRS[0].to_be_bytes() => {
            Verdict::Stranger("it is of a source by rdma:, and this end does not listen for RDMA".into())
        }
        Ok(4) if wanted == QUEUE_PAIRS && word == MAIN[0].to_be_bytes() => {
            Verdict::Stranger("it is of a source by tcp:, and this end listens for RDMA".into())
        }
        Ok(4) if word == multifd::MAGIC.to_be_bytes() => {
            Verdict::Stranger("it is a page channel, and this end expects none (multifd)".into())
        }
        Ok(count) => match word.get(..count) {
            Some(come) if fits(come) => Verdict::Open { begun: true },
            Some([TLS_HANDSHAKE, 3, ..]) => Verdict::Stranger(format!(
                "it begins a TLS handshake, and nothing is encrypted here; {}",
                Remedy::AlignTls
            )),
            come => {
                let come = come.unwrap_or(&word).escape_ascii();
                Verdict::Stranger(format!("it begins with \"{come}\", which is no migration"))
            }
        },
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Verdict::Open { begun: false }
        }
        Err(error) => Verdict::Stranger(format!("it broke: {error}")),
    }
}
