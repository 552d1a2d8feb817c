//! A connection that is lost before each end knows what the other knows: with the answer to the package, with the last
//! word, or between RUN and that answer.

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::{Machine, bytes};
use super::{Closes, SocketEnds, until};
use crate::engine::{Ending, Outcome};
use crate::guest::{DeviceState, GuestControl};
use crate::observe::Status;
use crate::session::*;
use crate::stream::native::Answer;
use crate::stream::qemu::package::PING_TAKEN;
use crate::stream::qemu::return_path::Message;
use crate::sys::{SendPart, Stop};
use crate::transport::{ByteSink, ChannelError, Sealed, StreamBreaker};
use crate::units::Rate;

/// Loses a message, with the connection that it is written to.
struct LosesMessage {
    sink: Box<dyn ByteSink>,
    message: Vec<u8>,
    lost: bool,
    breakers: Arc<Mutex<Vec<StreamBreaker>>>,
}

impl Sealed for LosesMessage {}

impl ByteSink for LosesMessage {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        if matches!(parts, [SendPart::Own(bytes)] if **bytes == *self.message) {
            // The peer has it in no buffer, and this end has sent it.
            self.breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
            self.lost = true;
            return Ok(());
        }
        self.sink.send(parts, stop)
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        if self.lost { Ok(()) } else { self.sink.flush(stop) }
    }

    fn position(&self) -> u64 {
        self.sink.position()
    }

    fn unacknowledged(&self) -> u64 {
        if self.lost { 1 } else { self.sink.unacknowledged() }
    }
}

/// A migration over sockets whose destination loses `message` with its first connection.
fn loses(message: Message<'_>) {
    let mut bytes_of = Vec::new();
    message.encode(&mut bytes_of);
    let breakers = Arc::new(Mutex::new(Vec::new()));
    let holder = Arc::clone(&breakers);
    let lose = move |sink| {
        Box::new(LosesMessage { sink, message: bytes_of, lost: false, breakers: holder }) as Box<dyn ByteSink>
    };
    let ends = SocketEnds::with_back(&[300, 7], true, |postcopy| postcopy.max_bandwidth = None, lose);
    breakers.lock().unwrap().append(&mut ends.breakers.lock().unwrap());
    let SocketEnds { source, destination, from, to, near, far, .. } = ends;
    let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
    let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
    assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
    assert!(!near.runs() && far.runs());
    assert!(breakers.lock().unwrap().is_empty(), "the first connection was lost");
    for block in 0..2 {
        assert!(bytes(&from, block) == bytes(&to, block), "block {block} differs");
    }
}

/// All pages are there, and the source does not receive the report: it connects again, sends only the end, and receives
/// the report then.
#[test]
fn p11_a_connection_lost_with_the_last_word_is_replaced_and_the_word_said_again() {
    loses(Message::Native(Answer::Running));
}

/// The source does not receive the answer by which it hands over the guest. Neither end runs it until the answer has come
/// on another connection.
#[test]
fn p1_p11_the_answer_that_hands_over_the_guest_is_sent_again_where_it_was_lost() {
    loses(Message::Pong(PING_TAKEN));
}

/// Loads the device state when it is told to, or fails then.
struct LoadsWhenTold(Machine, Receiver<bool>);

impl GuestControl for LoadsWhenTold {
    fn pause(&mut self) -> io::Result<()> {
        self.0.pause()
    }

    fn resume(&mut self) -> io::Result<()> {
        self.0.resume()
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for LoadsWhenTold {
    fn load(&mut self, from: &mut dyn io::Read) -> io::Result<()> {
        let loads = self.1.recv().unwrap_or(false);
        let devices = self.0.devices().filter(|_| loads);
        devices.ok_or_else(|| io::Error::other("these devices are unknown"))?.load(from)
    }
}

/// The connection is lost, twice, while the destination loads the device state. It keeps what has come, and pages follow
/// on the next connection. The guest starts there when its state is loaded, or else runs on at its source.
#[test]
fn p8_a_loss_between_run_and_its_answer_discards_nothing_while_the_source_may_connect_again() {
    for loads in [true, false] {
        let mut ends = SocketEnds::new(&[2000, 7], true, |postcopy| postcopy.max_bandwidth = None);
        let (tell, told) = channel();
        ends.destination.control_by(Box::new(LoadsWhenTold(ends.far.clone(), told)));
        let SocketEnds { source, destination, from, to, near, far, breakers, .. } = ends;
        let control = source.control();
        control.set_postcopy_bandwidth(Rate::limit(200 << 10));
        let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
        for _ in 0..2 {
            let came = destination.progress().pages.normal;
            until("pages follow", || {
                let now = destination.progress();
                now.status == Status::Device && now.pages.normal > came
            });
            breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
            until("another comes", || !breakers.lock().unwrap().is_empty());
        }
        let came = destination.progress().pages.normal;
        until("pages follow again", || destination.progress().pages.normal > came);
        assert!(!near.runs() && !far.runs(), "the device state is not loaded");
        control.set_postcopy_bandwidth(None);
        tell.send(loads).unwrap();
        let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
        assert_eq!((near.runs(), far.runs()), (!loads, loads), "{:?} {:?}", sent.error, arrived.error);
        if loads {
            assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
            assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
            for block in 0..2 {
                assert!(bytes(&from, block) == bytes(&to, block), "block {block} differs");
            }
        } else {
            assert_eq!((sent.guest_is_safe_here(), arrived.ending), (true, Ending::Discarded));
            let text = sent.error.as_ref().map(ToString::to_string).unwrap_or_default();
            assert!(text.contains("these devices are unknown"), "{text}");
        }
    }
}

/// Bytes that are sent arrive, and are not acknowledged.
struct Unacknowledged(Box<dyn ByteSink>);

impl Sealed for Unacknowledged {}

impl ByteSink for Unacknowledged {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        self.0.send(parts, stop)
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        self.0.flush(stop)
    }

    fn position(&self) -> u64 {
        self.0.position()
    }

    fn unacknowledged(&self) -> u64 {
        1
    }
}

fn unacknowledged(back: Box<dyn ByteSink>) -> Box<dyn ByteSink> {
    Box::new(Unacknowledged(back))
}

/// The connection is lost while the destination can't know whether its answer has made the guest its own: it neither
/// starts nor discards it until the source connects again.
#[test]
fn a_loss_between_the_answer_and_its_acknowledgement_leaves_no_guest_that_runs_nowhere() {
    for round in 0..3 {
        let set = |postcopy: &mut PostcopySettings| postcopy.preempt = round == 1;
        let ends = SocketEnds::with_back(&[2000, 7], true, set, unacknowledged);
        let SocketEnds { source, destination, from, to, near, far, breakers, .. } = ends;
        let control = source.control();
        let (destination, source) = (destination.spawn().unwrap(), source.spawn().unwrap());
        until("the source has the answer", || source.progress().status == Status::PostcopyActive);
        assert!(!far.runs() && !near.runs(), "not known there yet");
        breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
        until("it runs there", || far.runs());
        control.set_postcopy_bandwidth(None);
        let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(!near.runs() && far.runs());
        for block in 0..2 {
            assert!(bytes(&from, block) == bytes(&to, block), "block {block} differs");
        }
    }
}

/// The source does not connect again: the received pages are discarded, and the guest is never started.
#[test]
fn a_guest_that_its_source_may_have_is_not_started_where_no_other_connection_comes() {
    for closes in [true, false] {
        let set = |postcopy: &mut PostcopySettings| postcopy.reconnect_timeout = Duration::from_secs(1);
        let mut ends = SocketEnds::with_back(&[2000], true, set, unacknowledged);
        ends.destination.settings_mut().finish_timeout = Duration::from_millis(300);
        let source = if closes { ends.source.with_reconnect(Box::<Closes>::default()) } else { ends.source };
        let control = source.control();
        let (destination, source) = (ends.destination.spawn().unwrap(), source.spawn().unwrap());
        until("the source has the answer", || source.progress().status == Status::PostcopyActive);
        if !closes {
            // It does not try.
            control.pause().unwrap();
        }
        ends.breakers.lock().unwrap().drain(..).for_each(|breaker| breaker.reset());
        let (arrived, sent) = (destination.wait().unwrap(), source.wait().unwrap());
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Incomplete, Ending::Discarded));
        assert!(!ends.near.runs() && !ends.far.runs());
        let text = arrived.error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert!(text.contains("no other connection") && text.contains("at its source"), "{text}");
    }
}
