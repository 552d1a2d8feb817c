//! A connection lost in postcopy: both ends keep what they have, and the source connects again.
//!
//! ```text
//! S->D  RECV_BITMAP(block) for each block          D->S  RECV_BITMAP(block), bitmap
//! S->D  RESUME                                     D->S  RESUME_ACK, then all requests that are outstanding
//! S->D  pages as before
//! ```

use rustix::event::PollFlags;
use rustix::net::Shutdown;

use crate::engine::{HostPage, Ownership};
use crate::observe::Status;
use crate::stream::qemu::return_path::{Message, encode_bitmap};
use crate::sys::Stop;
use crate::transport::{ChannelError, InlineDestination, OpenError, StreamChannel};
use crate::units::BlockOffset;

use super::DestinationSession;
use super::arrivals::Use;
use super::postcopy::ACK_CHECK_INTERVAL;
use super::reader::StreamReader;
use super::receive::out_of_turn;
use crate::error::{Chain, Remedy};
use crate::session::{Breakage, Error};

/// Gives the connections that follow the first: the embedder's listener, or an address that it connects to.
pub trait NextConnection: Send {
    /// Waits for the next connection of the same source.
    ///
    /// # Errors
    /// No connection will arrive. The guest continues here; a thread that touches a missing page waits for ever.
    fn next(&mut self, stop: &Stop) -> Result<StreamChannel, OpenError>;
}

impl<F: FnMut(&Stop) -> Result<StreamChannel, OpenError> + Send> NextConnection for F {
    fn next(&mut self, stop: &Stop) -> Result<StreamChannel, OpenError> {
        self(stop)
    }
}

impl DestinationSession {
    /// True if a lost connection is no end.
    pub(super) fn may_recover(&self) -> bool {
        self.switch.may_recover() && !self.driver.cancel_token().is_cancelled()
    }

    /// Waits until the source's host has received the report that all pages have arrived: a source that lost the
    /// connection before that would connect again, and get no answer.
    ///
    /// # Errors
    /// The connection was lost with it.
    pub(super) fn await_acknowledgement(&mut self) -> Result<(), Error> {
        let may_recover = self.may_recover();
        let back = match self.switch.running().filter(|_| may_recover) {
            Some(postcopy) => Some(postcopy.shared.back.clone()),
            None => self.wire.back.clone().filter(|_| self.may_resume()),
        };
        let Some(back) = back.filter(|_| !self.breakage.is(Breakage::EndUnacknowledged)) else {
            return Ok(());
        };
        let doing = "telling the source that all has come";
        let connection = self.wire.link.stream().descriptor();
        let stop = Stop::never().within(self.settings.stall_timeout);
        while back.unacknowledged() > 0 {
            let piece = stop.within(ACK_CHECK_INTERVAL);
            // No event is requested: the wait ends early only by the connection's end.
            let lost = match connection {
                Some(connection) => matches!(piece.wait(connection, PollFlags::empty()), Ok(None)),
                // Its end can't be seen.
                None => stop.sleep(ACK_CHECK_INTERVAL).is_none(),
            };
            if lost && back.unacknowledged() > 0 {
                return Err(ChannelError::Closed { peer: "the source".into(), doing }.into());
            }
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing }.into());
            }
        }
        Ok(())
    }

    /// Drops the old connection and waits for the next one. A cancel ends the wait. The finish timeout ends it as well,
    /// if it is not known that the source has handed over the guest, or if the source only has to receive the report
    /// that all pages have arrived.
    pub(super) fn await_recovery(&mut self, reader: &mut StreamReader) -> Result<(), Error> {
        let next = self.switch.next().clone();
        let Some(postcopy) = self.switch.running_mut() else {
            return Err(out_of_turn("a lost connection", "precopy"));
        };
        postcopy.shared.lose_connection();
        let is_here = postcopy.shared.owner.get() == Ownership::Here;
        if let Some(error) = &self.error {
            let guest = if is_here { "the guest runs on" } else { "the guest waits: its source may have it" };
            tracing::warn!(%error, guest, "the connection is lost, and the source may connect again");
        }
        postcopy.shared.back.replace(None);
        postcopy.end_reads(&self.settings.spawner)?;
        // Whichever end lost it: a source that waits for an answer on it would not notice.
        match self.wire.link.stream().descriptor() {
            Some(connection) => _ = rustix::net::shutdown(connection, Shutdown::Both),
            None => self.drop_link(),
        }
        let Some(postcopy) = self.switch.running_mut() else {
            return Err(out_of_turn("a lost connection", "precopy"));
        };
        self.figures.shared().update(|s| s.status = Status::PostcopyPaused);
        self.ingest.forget_parts();
        let stop = Stop::on(&self.driver.cancel_token());
        let is_whole = self.driver.engine.is_whole();
        let waits = is_here && !is_whole;
        let stop = if waits { stop } else { stop.within(self.settings.finish_timeout) };
        let connected = match (postcopy.preempt.end(), next.take()) {
            (Some(early), connections) => {
                next.put(connections);
                Ok(early)
            }
            (None, Some(mut connections)) => {
                let connected = connections.first_with_data(&stop, |_| {});
                // After a failure a second call would return the same.
                next.put(Some(connections).filter(|_| connected.is_ok()));
                match connected {
                    Ok((_, Use::Urgent)) => {
                        return Err(out_of_turn("a connection that begins with pages", "recovery"));
                    }
                    Ok((channel, Use::Main)) => Ok(channel),
                    Err(error) => Err(error),
                }
            }
            (None, None) => return Err(out_of_turn("a lost connection", "a session without another")),
        };
        let (source, back) = match connected {
            Ok(channel) => channel.with_return_path(),
            Err(error) => {
                return Err(Error::Config {
                    what: match self.error.take() {
                        Some(lost) => {
                            format!("{}; no other connection of the source can come: {error}", Chain(&lost))
                        }
                        None => format!("no other connection of the source can come: {error}"),
                    },
                    remedy: Remedy::Advice(match is_here {
                        true if is_whole => {
                            "the guest runs here with all its memory, and its source was not informed: release \
                            its memory there"
                        }
                        true => {
                            "the guest runs here, and waits forever where it touches a page that is missing"
                        }
                        false => {
                            "the guest was not started here, and all of it is at its source: check whether it \
                            runs there, and resume it if it does not"
                        }
                    }),
                });
            }
        };
        let Some(back) = back else { return Err(out_of_turn("a connection of one direction", "recovery")) };
        postcopy.shared.reconnected(Box::new(back));
        self.wire.stop = postcopy.shared.stop();
        postcopy.recovering = true;
        self.wire.link = Box::new(InlineDestination::new(Box::new(source)));
        self.error = None;
        reader.restart();
        if postcopy.shared.load_has_failed() {
            // The source is told, and has its guest back.
            return Err(out_of_turn("another connection", "a device state that could not be loaded"));
        }
        self.figures.shared().update(|s| s.status = Status::PostcopyRecover);
        Ok(())
    }

    /// Reports to the source which pages of a block are here. Only after a loss: a QEMU requests it at no other time.
    pub(super) fn send_received(&mut self, name: &str) -> Result<(), Error> {
        let Some(postcopy) = self.switch.running() else { return Ok(()) };
        if !postcopy.recovering {
            return Err(out_of_turn("RECV_BITMAP", "postcopy on its first connection"));
        }
        let shared = &postcopy.shared;
        let found = shared.placer.memory().table().find(name);
        let block = found.map_err(|error| out_of_turn(&format!("RECV_BITMAP, {error}"), "recovery"))?;
        let mut bytes = Vec::new();
        Message::ReceivedBitmap { block: name }.encode(&mut bytes);
        encode_bitmap(&shared.placer.received_bits(block), &mut bytes);
        Ok(shared.back.write(&bytes, &self.wire.stop.within(shared.send_timeout))?)
    }

    /// The source knows which pages are missing, and continues.
    pub(super) fn resume_requests(&mut self) -> Result<(), Error> {
        let Some(postcopy) = self.switch.running_mut() else { return Ok(()) };
        if !postcopy.recovering {
            return Err(out_of_turn("RESUME", "postcopy on its first connection"));
        }
        let shared = &postcopy.shared;
        // A source that has its guest back does not come here.
        if shared.owner.get() == Ownership::GivenUp {
            return Err(out_of_turn("RESUME", "a postcopy that was given up"));
        }
        let table = shared.placer.memory().table();
        let page_at = |HostPage { block, offset }| {
            let bytes = table.get(block).map_or(table.page(), |block| block.host_page).bytes();
            table.admit(block, BlockOffset(offset), bytes).ok()
        };
        let pages = || shared.pager().outstanding().filter_map(page_at).collect();
        let stop = self.wire.stop.within(shared.send_timeout);
        shared.back.resume(Message::ResumeAck(1), &shared.placer, pages, &stop)?;
        shared.answer_again(&stop)?;
        let is_here = shared.owner.get() == Ownership::Here;
        postcopy.preempt.start(postcopy.shared.urgent_pages())?;
        postcopy.recovering = false;
        let status = if is_here { Status::PostcopyActive } else { Status::Device };
        self.figures.shared().update(|s| s.status = status);
        Ok(())
    }
}
