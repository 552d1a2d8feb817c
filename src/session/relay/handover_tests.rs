//! A relay between two ramwires, all three in one process: from which end it requests the guest, and how long it may be
//! idle.
#![allow(clippy::unwrap_used)]

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::engine::{Ending, Outcome, PostcopyRule};
use crate::guest::{DeviceState, GuestControl};
use crate::session::tests::{Ends, Machine, ends, ends_with, plain};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::transport::{InlineLink, StreamChannel, StreamOptions};

/// A machine that can't take its device state.
struct Refusing;

impl GuestControl for Refusing {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        panic!("it was never given the guest")
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Refusing {
    fn load(&mut self, _from: &mut dyn Read) -> io::Result<()> {
        Err(io::Error::other("a device is missing"))
    }
}

/// Source -> relay -> destination, all three of ramwire's. `None`: a far end that refuses the device state.
fn through_a_relay(far_machine: Option<Machine>) -> (SourceReport, RelayReport, DestinationReport, Machine) {
    relayed(ends(), far_machine, DestinationSettings::default())
}

fn relayed(
    ends: Ends,
    far_machine: Option<Machine>,
    incoming: DestinationSettings,
) -> (SourceReport, RelayReport, DestinationReport, Machine) {
    let Ends { source, source_machine, to, .. } = ends;
    let (near, upstream) = UnixStream::pair().unwrap();
    let (downstream, far) = UnixStream::pair().unwrap();
    let mut source = source;
    let link = Box::new(InlineLink::new(plain(&near), Arc::clone(&source.guest_mut().memory)));
    source.connect(SourceConnection::new(link, Some(plain(&near))));
    let control: Box<dyn GuestControl> = match far_machine {
        Some(machine) => Box::new(machine),
        None => Box::new(Refusing),
    };
    let destination = DestinationSession::new(
        DestinationGuest { memory: Box::new(to), control },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        DestinationSettings::default(),
    );
    let connect = move |memory: Arc<dyn crate::guest::GuestMemory>| {
        let link = Box::new(InlineLink::new(plain(&downstream), memory));
        Ok(SourceConnection::new(link, Some(plain(&downstream))))
    };
    let relay = Relay {
        connection: DestinationConnection::of_stream(plain(&upstream), Some(plain(&upstream))),
        connect: Box::new(connect),
        incoming,
        outgoing: SourceSettings::new(Configuration::default()),
        urgent_came: false,
        urgent: None,
        huge_pages: false,
        cancel: crate::sys::CancelToken::default(),
        control: RelayControl::default(),
        guard: None,
        notice: Arc::new(|_| ()),
        statistics: crate::observe::SharedStatistics::default(),
    };
    drop((near, upstream, far));
    let threads = (std::thread::spawn(|| relay.run()), std::thread::spawn(|| destination.run()));
    let sent = source.run();
    (sent, threads.0.join().unwrap(), threads.1.join().unwrap(), source_machine)
}

#[test]
fn a_relay_asks_for_the_guest_only_when_its_far_end_could_take_it() {
    let far = Machine::default();
    let (sent, relayed, arrived, source_machine) = through_a_relay(Some(far.clone()));
    assert_eq!(sent.outcome, Outcome::Completed, "{:?} {:?}", sent.error, relayed.received.error);
    assert_eq!((relayed.received.ending, arrived.ending), (Ending::Running, Ending::Running));
    assert!(far.runs() && !source_machine.runs());

    let (sent, relayed, arrived, source_machine) = through_a_relay(None);
    assert!(sent.guest_is_safe_here() && source_machine.runs(), "{:?} {:?}", sent.outcome, sent.error);
    assert_eq!((relayed.received.ending, arrived.ending), (Ending::Discarded, Ending::Discarded));
    let why = crate::error::Chain(&sent.error.unwrap()).to_string();
    assert!(why.contains("a device is missing"), "{why}");
}

/// The far end, or the relay itself, does not allow a switch: the guest stays where it is.
#[test]
fn a_switch_to_postcopy_that_is_not_allowed_on_the_whole_way_is_refused() {
    for postcopy in [false, true] {
        let settings = PostcopySettings::new(PostcopyRule::AfterRounds(0));
        let from = ends_with(|from| (from.verify, from.postcopy) = (Verify::Off, Some(settings)));
        let incoming = DestinationSettings { postcopy, ..Default::default() };
        let far = Machine::default();
        let (sent, relayed, _, source_machine) = relayed(from, Some(far.clone()), incoming);
        assert!(sent.guest_is_safe_here() && source_machine.runs(), "{:?} {:?}", sent.outcome, sent.error);
        assert_eq!((relayed.received.ending, sent.statistics.pages.normal), (Ending::Discarded, 0));
        assert!(!far.runs());
        let why = crate::error::Chain(&relayed.received.error.unwrap()).to_string();
        assert!(why.contains("postcopy"), "{why}");
    }
}

/// The guest's own source, which is silent for a while.
struct Silent(u32);

impl Upstream for Silent {
    fn wait(&mut self, time: std::time::Duration) -> Result<News, Error> {
        std::thread::sleep(time);
        self.0 -= 1;
        Ok(if self.0 == 0 { News::Stopped } else { News::None })
    }
    fn wait_for_ownership(
        &mut self,
        _: crate::engine::Handover,
        _time: std::time::Duration,
    ) -> Result<bool, Error> {
        Ok(true)
    }
}

#[test]
fn a_far_end_does_not_take_an_idle_relay_for_a_dead_one() {
    let stall = std::time::Duration::from_secs(3);
    let options = StreamOptions { stall: Some(stall), ..StreamOptions::default() };
    let channel = |socket: UnixStream| StreamChannel::from_fd(socket.into(), "peer", &options).unwrap();
    let Ends { source, to, destination_machine, .. } = ends();
    let (near, far) = UnixStream::pair().unwrap();
    let (guest, mut settings) = source.into_parts();
    let connection = SourceConnection::over(channel(near), Arc::clone(&guest.memory));
    (settings.stall_timeout, settings.all_dirty_at_start) = (stall, false);
    // Waits of 5 ms: twice the far end's patience.
    let source = SourceSession::new(guest, connection, settings).with_upstream(Box::new(Silent(1200)));
    let control = Box::new(destination_machine.clone());
    let destination = DestinationSession::new(
        DestinationGuest { memory: Box::new(to), control },
        DestinationConnection::over(channel(far)),
        DestinationSettings::default(),
    );
    let thread = std::thread::spawn(|| destination.run());
    let sent = source.run();
    let arrived = thread.join().unwrap();
    // Nothing was dirty, so the digest differs; but no wait timed out.
    let why = arrived.error.map(|error| crate::error::Chain(&error).to_string()).unwrap_or_default();
    assert!(why.contains("differs from the source's"), "{why} {:?}", sent.error);
}
