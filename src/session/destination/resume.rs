//! A connection lost before the source knows that the guest runs here: both ends keep what they have, and the source
//! connects again.
//!
//! ```text
//! S->D  RESUME                                     D->S  HOLDS: the last fence that has come
//! S->D  RECV_BITMAP(block) for each block          D->S  RECV_BITMAP(block), bitmap: pages that came since that fence
//! S->D  rounds as before
//! ```
//!
//! # Required order
//!
//! Nothing of the old connection is read or placed after HOLDS: its page channels have ended before. The connection is dropped only for one that proves that it is the
//! source's, and the newest one.

use std::time::Duration;

use rustix::net::Shutdown;

use crate::engine::{Agreement, DestinationEvent};
use crate::error::{Chain, Remedy};
use crate::ram::page_bits;
use crate::session::callback::quietly;
use crate::session::{Breakage, Error};
use crate::stream::native::{Answer, Hello, Order, Purpose, Resume};
use crate::stream::qemu::command::{Command, HEAD_LEN, decode_command};
use crate::stream::qemu::return_path::{Message, encode_bitmap};
use crate::sys::{RecvPart, Stop, StopReason, random_id};
use crate::transport::{
    ByteSink, ByteSource, ChannelError, DestinationLink, InlineDestination, MoveError, OpenError,
    StreamChannel,
};

use super::DestinationSession;
use super::arrivals::{Begins, SharedNext, first_bytes};
use super::counts::FENCE;
use super::reader::StreamReader;
use super::receive::out_of_turn;

/// Interval at which a destination whose source is silent looks whether it has connected again, and the length of a look.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const LOOK_TIME: Duration = Duration::from_millis(5);
/// How long a connection may take to say all of RESUME after its first byte.
const SPEAK_TIMEOUT: Duration = Duration::from_secs(5);
/// What a destination does whose source is silent.
const DOING: &str = "reading the stream";
/// Bytes of RESUME.
const RESUME_LEN: usize = HEAD_LEN + Resume::LEN;

/// Both directions of a connection.
pub(in crate::session) type BothWays = (Box<dyn ByteSource>, Box<dyn ByteSink>);

/// Where further connections come from.
pub(in crate::session) trait Further: Send {
    /// Waits for one on which all of RESUME has come, or what may be it.
    ///
    /// # Errors
    /// None has come until the stop, or none can come.
    fn next(&mut self, stop: &Stop) -> Result<BothWays, OpenError>;
}

/// Those that the embedder's listener accepts.
pub(super) struct Accepts(pub(super) SharedNext);

impl Further for Accepts {
    fn next(&mut self, stop: &Stop) -> Result<BothWays, OpenError> {
        loop {
            let Some(mut connections) = self.0.take() else {
                return Err(OpenError::OnlyOne { address: "the source's connection".into() });
            };
            let spoken = connections.first_that(stop, |_| {}, has_resume);
            self.0.put(Some(connections));
            let (channel, ()) = spoken?;
            if let (source, Some(back)) = channel.with_return_path() {
                return Ok((Box::new(source), Box::new(back)));
            }
        }
    }
}

/// A connection that continues the migration.
struct Accepted {
    source: Box<dyn ByteSource>,
    back: Box<dyn ByteSink>,
    resume: Resume,
}

/// What both ends have said in HELLO.
struct Agreed {
    ours: Agreement,
    /// The source's secret.
    theirs: [u8; 16],
    /// The last fence that has come.
    fence: u64,
}

/// Further connections of the source, before it knows that the guest runs here.
#[derive(Default)]
pub(super) struct Resumption {
    further: Option<Box<dyn Further>>,
    agreed: Option<Agreed>,
    /// One that came while the old one was still held for good.
    early: Option<Accepted>,
    /// Looks since the last byte of the source, and the bytes that had come beside the stream at the last one.
    looks: u32,
    heard_beside: u64,
    /// The device state was loaded.
    loaded: bool,
    /// This is not the first connection.
    pub(super) is_later: bool,
}

impl Resumption {
    pub(super) fn accept_from(&mut self, further: Box<dyn Further>) {
        self.further = Some(further);
    }

    /// Both ends know how another connection begins.
    pub(super) fn is_agreed(&self) -> bool {
        self.agreed.is_some()
    }

    /// The source may connect again: it has all that this needs.
    fn is_offered(&self) -> bool {
        self.agreed.as_ref().is_some_and(|agreed| agreed.fence > 0)
    }

    /// Bytes have come.
    pub(super) fn heard(&mut self) {
        self.looks = 0;
    }

    /// So many bytes have come beside the stream: while page channels fill memory, nothing comes in it.
    fn heard_beside(&mut self, bytes: u64) {
        if bytes != self.heard_beside {
            (self.heard_beside, self.looks) = (bytes, 0);
        }
    }

    /// The device state is given to the VMM.
    pub(super) fn loads(&mut self) {
        self.loaded = true;
    }

    /// Waits for a connection that proves to be the source's. Others are closed.
    fn accept(&mut self, stop: &Stop) -> Result<Accepted, OpenError> {
        let (Some(further), Some(agreed)) = (&mut self.further, &mut self.agreed) else {
            return Err(OpenError::OnlyOne { address: "the source's connection".into() });
        };
        loop {
            let (mut source, back) = further.next(stop)?;
            let resume = match first_message(&mut *source) {
                Ok(resume) => resume,
                Err(error) => {
                    tracing::debug!(error = %Chain(&error), "a connection that is of no use");
                    continue;
                }
            };
            match agreed.ours.admit(&resume) {
                Ok(()) => return Ok(Accepted { source, back, resume }),
                Err(why) => tracing::warn!(%why, "a connection was closed that is to continue a migration"),
            }
        }
    }
}

/// Whether all of RESUME has come on a connection: a stranger that says less is not waited for.
fn has_resume(channel: &StreamChannel) -> Begins<()> {
    let mut bytes = [0; RESUME_LEN];
    match first_bytes(channel, &mut bytes) {
        Begins::As(come) if !may_be_resume(come) => Begins::Otherwise,
        Begins::As(come) if come.len() < RESUME_LEN => Begins::InPart,
        Begins::As(_) => Begins::As(()),
        Begins::NotYet => Begins::NotYet,
        Begins::InPart | Begins::Otherwise => Begins::Otherwise,
    }
}

/// True if these are the first bytes of a RESUME, as far as all have the same.
fn may_be_resume(come: &[u8]) -> bool {
    let any = Resume { migration_id: [0; 16], secret: [0; 16], attempt: 0, purpose: Purpose::GoOn };
    let mut resume = Vec::new();
    Command::Native(Order::Resume(any)).encode(&mut resume);
    come.iter().zip(&resume).take(HEAD_LEN).all(|(come, resume)| come == resume)
}

/// RESUME, with which a further connection begins.
fn first_message(source: &mut dyn ByteSource) -> Result<Resume, Error> {
    let stop = Stop::never().within(SPEAK_TIMEOUT);
    let mut bytes = [0; RESUME_LEN];
    let mut have = 0;
    while have < RESUME_LEN {
        have += match source.recv(&mut [RecvPart::Own(&mut bytes[have..])], &stop)? {
            0 => return Err(Error::Truncated { at: have as u64, inside: "RESUME" }),
            got => got,
        };
    }
    match decode_command(&bytes)? {
        (Command::Native(Order::Resume(resume)), RESUME_LEN) => Ok(resume),
        (other, _) => Err(out_of_turn(other.name(), "a connection that is to continue a migration")),
    }
}

/// Placeholder for a connection that is gone.
struct Gone;

impl crate::transport::Sealed for Gone {}

impl ByteSource for Gone {
    fn recv(&mut self, _into: &mut [RecvPart<'_>], _stop: &Stop) -> Result<usize, ChannelError> {
        Err(ChannelError::Closed { peer: "the source".into(), doing: DOING })
    }
}

impl DestinationSession {
    /// The source of further connections, in tests.
    #[cfg(test)]
    pub(in crate::session) fn resumed_by(&mut self, further: Box<dyn Further>) {
        self.resumption.accept_from(further);
    }

    /// HELLO: whether a lost connection may be followed by another. Returns our secret if it may.
    pub(super) fn agree_on_resumption(&mut self, theirs: &Hello) -> Option<[u8; 16]> {
        let able = self.wire.link.abilities();
        let waits = self.settings.reconnect_timeout > Duration::ZERO && self.resumption.further.is_some();
        let other = theirs.passes || theirs.urgent || self.ingest.is_watched();
        let secret = theirs.secret.filter(|_| !able.on_demand && waits && !other)?;
        let ours = Agreement { migration_id: theirs.migration_id, secret: random_id(), attempt: 0 };
        self.resumption.agreed = Some(Agreed { ours, theirs: secret, fence: 0 });
        Some(ours.secret)
    }

    /// True if a lost connection is no end, before the source knows that the guest runs here.
    pub(super) fn may_resume(&self) -> bool {
        let ends = self.driver.cancel_token().is_cancelled() && !self.driver.engine.is_bound();
        self.resumption.is_offered() && !ends
    }

    /// True if a loss is one of a connection that RESUME replaces.
    pub(super) fn is_before_the_guest(&self) -> bool {
        self.resumption.is_agreed() && !self.switch.is_running()
    }

    /// FENCE: all in front of it is in place.
    pub(super) fn fence(&mut self, number: u64) -> Result<(), Error> {
        let Some(agreed) = &mut self.resumption.agreed else {
            return Err(out_of_turn("FENCE", "no other connection was agreed on"));
        };
        if number <= agreed.fence {
            return Err(out_of_turn("FENCE of an earlier number", "a migration that goes on"));
        }
        // What is confirmed is not counted again on another connection.
        let on_channels = self.reported.at_barrier.clone();
        self.compare_counts(on_channels, FENCE)?;
        let Some(agreed) = &mut self.resumption.agreed else { return Ok(()) };
        agreed.fence = number;
        self.ingest.placing()?.fenced()?;
        self.send_message(Message::Native(Answer::Fenced { number }))
    }

    /// Whether the source may be silent in the next read, and how long that may take. `between`: it begins between two
    /// items of the stream.
    pub(super) fn next_read(&mut self, between: bool) -> (bool, Stop) {
        let relays = self.switch.relayed().is_some();
        // After a switch a relay's source may have sent everything, and waits for the far end's answer. From the answer on
        // its silence is one, so the read begins again from time to time.
        let waits = between && relays && self.ingest.source_may_be_silent();
        let again = waits || self.may_resume();
        let stop = if again { self.wire.stop.within(LOOK_INTERVAL) } else { self.wire.stop.clone() };
        let silent = waits || self.is_reading() || between && !relays && self.may_hold_its_switchover();
        (silent, stop)
    }

    /// A read has ended without a byte. The source may have lost the connection and have connected again, while nothing
    /// tells this end: the old connection is given up for that one.
    ///
    /// # Errors
    /// It was, or the read ended for another reason.
    pub(super) fn look_for_source(&mut self, error: Error) -> Result<(), Error> {
        if !error.is_deadline() || self.wire.stop.reason().is_some() {
            return Err(error);
        }
        if !self.may_resume() {
            return if self.switch.relayed().is_some() { Ok(()) } else { Err(error) };
        }
        let peer = || "the source".to_owned();
        self.resumption.heard_beside(self.wire.link.channel_bytes());
        self.resumption.looks += 1;
        let after = self.settings.stall_timeout;
        if LOOK_INTERVAL.saturating_mul(self.resumption.looks) >= after {
            return Err(ChannelError::Stalled { peer: peer(), doing: DOING, after }.into());
        }
        self.has_come_again()
    }

    /// How long this end waits for a silent source before it looks whether it has connected again.
    pub(super) fn look_interval(&self) -> Duration {
        if self.may_resume() { LOOK_INTERVAL } else { Duration::MAX }
    }

    /// Looks whether the source has connected again, while the old connection seems to be there.
    ///
    /// # Errors
    /// It has: the old one is given up.
    pub(super) fn has_come_again(&mut self) -> Result<(), Error> {
        if let Ok(accepted) = self.resumption.accept(&Stop::never().within(LOOK_TIME)) {
            self.resumption.early = Some(accepted);
            let (peer, doing) = ("the source".into(), "it has connected again");
            return Err(ChannelError::Closed { peer, doing }.into());
        }
        Ok(())
    }

    /// Waits at the old connection for what `wait` waits for, and looks from time to time whether the source has connected
    /// again.
    ///
    /// # Errors
    /// As [`look_for_source`](Self::look_for_source).
    pub(super) fn wait_or_look<T>(
        &mut self,
        mut wait: impl FnMut(&mut dyn DestinationLink, &Stop) -> Result<T, MoveError>,
    ) -> Result<T, Error> {
        loop {
            let looks = self.may_resume();
            let stop = if looks { self.wire.stop.within(LOOK_INTERVAL) } else { self.wire.stop.clone() };
            match wait(&mut *self.wire.link, &stop) {
                Ok(done) => return Ok(done),
                Err(error) => self.look_for_source(error.into())?,
            }
        }
    }

    /// Drops the old connection, and waits for the source.
    pub(super) fn await_source(&mut self, reader: &mut StreamReader) -> Result<DestinationEvent, Error> {
        if let Some(error) = &self.error {
            tracing::warn!(error = %Chain(error), "the connection is lost, and the source may connect again");
        }
        if let Some(connection) = self.wire.link.stream().descriptor() {
            let _ = rustix::net::shutdown(connection, Shutdown::Both);
        }
        if let Some(back) = &self.wire.back {
            back.replace(None);
        }
        self.drop_link();
        let bound = self.driver.engine.is_bound();
        let stop = if bound { Stop::never() } else { Stop::on(&self.driver.cancel_token()) };
        // The source may notice the loss as much later.
        let stop = stop.within(self.settings.reconnect_timeout.saturating_add(self.settings.stall_timeout));
        let accepted = match self.resumption.early.take() {
            Some(early) => Ok(early),
            None => self.resumption.accept(&stop),
        };
        match accepted {
            Ok(Accepted { resume: Resume { purpose: Purpose::GiveUp, .. }, .. }) => {
                tracing::warn!("the source has connected again to say that its guest stays there");
                let why = "it gave the migration up, and the guest runs on there".into();
                self.error = Some(Error::PeerFailed { why });
                Ok(DestinationEvent::Failed)
            }
            Ok(accepted) => self.resume(accepted, reader),
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "the source has not connected again");
                if stop.reason() == Some(StopReason::Cancelled) {
                    self.error = Some(Error::Cancelled);
                }
                Ok(DestinationEvent::Failed)
            }
        }
    }

    /// Orders 8 and 14: nothing that comes beside the stream is placed any more. Page channels end, keys and queue pairs are
    /// destroyed.
    pub(super) fn drop_link(&mut self) {
        let registered = self.wire.link.abilities().has_rounds;
        let order = if registered { Breakage::KeepOldKeys } else { Breakage::KeepOldChannels };
        if !self.breakage.is(order) {
            self.wire.link.revoke();
        }
        self.wire.replace(Box::new(InlineDestination::new(Box::new(Gone))));
        // Order 7.
        if registered {
            quietly("allowing discards", || _ = self.guest.control.forbid_discard(false));
        }
    }

    /// Goes on over another connection.
    fn resume(&mut self, accepted: Accepted, reader: &mut StreamReader) -> Result<DestinationEvent, Error> {
        let Accepted { source, back, resume } = accepted;
        let committed = resume.purpose == Purpose::AskForGuest;
        let starts = self.breakage.is(Breakage::StartWhenResumed) && self.driver.engine.is_bound();
        let committed = committed || starts;
        self.wire.replace(Box::new(InlineDestination::new(source)));
        if let Some(writer) = &self.wire.back {
            writer.replace(Some(back));
        }
        self.resumption.is_later = true;
        self.resumption.heard();
        reader.restart();
        if committed {
            self.wire.stop = Stop::never();
        } else {
            self.wire.stop = Stop::on(&self.driver.cancel_token());
            self.forget_switchover()?;
        }
        let Some(Agreed { theirs: secret, fence, .. }) = self.resumption.agreed else {
            return Err(out_of_turn("RESUME", "no other connection was agreed on"));
        };
        self.send_message(Message::Native(Answer::Holds { secret, fence }))?;
        self.error = None;
        Ok(DestinationEvent::Resumed { committed })
    }

    /// The guest runs on at its source: what came of it since it was paused is sent again, but for its pages.
    fn forget_switchover(&mut self) -> Result<(), Error> {
        let loads_again = self.guest.control.devices().is_none_or(|devices| devices.loads_again());
        if self.resumption.loaded && !loads_again {
            let error = Error::Config {
                what: "the connection was lost after the guest's device state was loaded, and this VMM can't load another".into(),
                remedy: Remedy::Advice("start the migration again"),
            };
            let why = error.to_string();
            self.send_message(Message::Native(Answer::Refused { why: &why }))?;
            return Err(error);
        }
        self.ingest.forget_switchover(self.breakage)?;
        self.reported.forget_switchover();
        self.figures.ram_continues();
        Ok(())
    }

    /// Reports to the source which pages of a block have come since the last fence.
    pub(super) fn send_since_fence(&mut self, name: &str) -> Result<(), Error> {
        let placing = self.ingest.placing()?;
        let found = placing.memory().table().find(name);
        let block = found.map_err(|error| out_of_turn(&format!("RECV_BITMAP, {error}"), "recovery"))?;
        let mut bytes = Vec::new();
        Message::ReceivedBitmap { block: name }.encode(&mut bytes);
        let since = placing.placer().since_fence(block);
        let bits = since.map(|pages| page_bits(pages.len(), |page| pages.get(page))).unwrap_or_default();
        encode_bitmap(&bits, &mut bytes);
        let stop = self.wire.stop.within(self.settings.stall_timeout);
        let Some(back) = &self.wire.back else { return Ok(()) };
        Ok(back.write(&bytes, &stop)?)
    }
}
