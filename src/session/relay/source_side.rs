//! The guest, to the session towards its source: it runs when the far end says so, and the source is told no more than
//! the engine allows.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::engine::{RelayAction, RelayEvent};
use crate::guest::{DeviceState, GuestControl};
use crate::session::Error;
use crate::sys::{CancelToken, SendPart, Stop};
use crate::transport::{ByteSink, ChannelError};

use super::ends::POLL_INTERVAL;
use super::hub::Hub;

/// The far end does not have the guest, and why: no step of this end has failed.
#[derive(Debug, thiserror::Error)]
#[error("the far end did not take the guest: {0}")]
pub(super) struct NotTaken(String);

impl NotTaken {
    /// What ended the side towards the source, told as what it was.
    pub(super) fn told(error: Error) -> Error {
        match &error {
            Error::Control { source, .. } => {
                match source.get_ref().and_then(|inner| inner.downcast_ref::<Self>()) {
                    Some(why) => Error::PeerFailed { why: why.to_string() },
                    None => error,
                }
            }
            _ => error,
        }
    }
}

/// The source side's guest: it "runs" when the far end reports it.
pub(super) struct SourceSide {
    pub(super) hub: Arc<Hub>,
    pub(super) cancel: CancelToken,
    pub(super) silenced: Arc<AtomicBool>,
    pub(super) waits: Arc<AtomicBool>,
}

impl SourceSide {
    /// Checks what to report to the source, waiting for a short time at most.
    fn answer(&self, go: RelayAction) -> Option<io::Result<()>> {
        let tells = [go, RelayAction::TellFailed, RelayAction::TellNothing];
        let inner = self.hub.wait(POLL_INTERVAL, |inner| tells.iter().any(|action| inner.has(*action)));
        match () {
            () if inner.has(go) => Some(Ok(())),
            () if inner.has(RelayAction::TellFailed) => {
                let why = inner.why();
                Some(Err(io::Error::other(NotTaken(why))))
            }
            () if inner.has(RelayAction::TellNothing) => {
                self.silenced.store(true, Ordering::Release);
                let why = inner.why();
                Some(Err(io::Error::other(format!("the far end was given the guest and fell silent: {why}"))))
            }
            () => None,
        }
    }
}

impl GuestControl for SourceSide {
    /// The relay's own memory stays as it is.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }

    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// The guest was handed to the relay: hands it on, and returns the far end's answer.
    fn resume(&mut self) -> io::Result<()> {
        self.hub.post(RelayEvent::GuestGiven { waits: self.waits.load(Ordering::Acquire) });
        loop {
            if let Some(answer) = self.answer(RelayAction::TellRunning) {
                return answer;
            }
            if self.hub.lock().engine.is_in_doubt() && self.hub.source_is_gone() {
                self.hub.post(RelayEvent::SourceGone);
            }
        }
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for SourceSide {
    /// The guest may be requested only when the far end is ready to take it over: the far side's own timeouts limit the
    /// wait.
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut state = Vec::new();
        from.read_to_end(&mut state)?;
        self.hub.lock().device_state = Some(state);
        self.hub.post(RelayEvent::StateArrived);
        loop {
            if let Some(answer) = self.answer(RelayAction::AskForGuest) {
                return answer;
            }
            if self.cancel.is_cancelled() {
                self.hub.post(RelayEvent::Cancel);
            }
        }
    }
}

/// The sink for messages to the source, until no more may be sent.
pub(super) struct RelaySink {
    sink: Box<dyn ByteSink>,
    silenced: Arc<AtomicBool>,
}

impl RelaySink {
    pub(super) fn over(sink: Box<dyn ByteSink>, silenced: &Arc<AtomicBool>) -> Box<dyn ByteSink> {
        Box::new(Self { sink, silenced: Arc::clone(silenced) })
    }
}

impl crate::transport::Sealed for RelaySink {}

impl ByteSink for RelaySink {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        if self.silenced.load(Ordering::Acquire) {
            let peer = "the guest's source".into();
            return Err(ChannelError::Closed {
                peer,
                doing: "sending it no answer while the guest is in doubt",
            });
        }
        self.sink.send(parts, stop)
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.sink.flush(stop)
    }

    fn finish(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.sink.finish(stop)
    }

    fn tolerate_outage(&mut self, limit: Duration) {
        self.sink.tolerate_outage(limit);
    }

    fn position(&self) -> u64 {
        self.sink.position()
    }

    fn unacknowledged(&self) -> u64 {
        self.sink.unacknowledged()
    }
}
