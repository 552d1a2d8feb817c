//! A switch to postcopy with page channels: pages that nobody waits for come on them.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::super::{Machine, bytes, guest};
use super::{listen, touch, until};
use crate::engine::{Ending, Outcome, PostcopyRule};
use crate::guest::MappedGuest;
use crate::observe::Status;
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::Stop;
use crate::transport::{
    ChannelOptions, ConnectionOptions, DestinationConnection, SourceConnection, StreamBreaker, StreamChannel,
    StreamOptions, connect,
};
use crate::units::{BlockIndex, Rate};

const PAGES: u64 = 3000;

/// Both ends run, over a main connection by TCP and two page channels. Half of the pages are zero.
struct Running {
    source: MigrationHandle<SourceReport>,
    destination: MigrationHandle<DestinationReport>,
    ends: (Arc<MappedGuest>, Arc<MappedGuest>),
    machines: (Machine, Machine),
    breakers: Arc<Mutex<Vec<StreamBreaker>>>,
    /// The destination's ends of the page channels, which break them.
    channels: Vec<StreamBreaker>,
    control: Control,
}

fn run(set: impl FnOnce(&mut PostcopySettings)) -> Running {
    let (from, to) = (guest(&[PAGES, 7]), guest(&[PAGES, 7]));
    for page in (0..PAGES).filter(|page| page % 2 == 1) {
        let span = from.region(BlockIndex(0)).unwrap().span(page * 4096, 4096).unwrap();
        span.copy_from(&[page as u8 | 1; 4096]);
    }
    let breakers = Arc::new(Mutex::new(Vec::new()));
    let ([here, _], mut next) = listen(&breakers);
    let channel = |socket: UnixStream| {
        StreamChannel::from_fd(socket.into(), "a page channel", &StreamOptions::default()).unwrap()
    };
    let pairs = (0..2).map(|_| UnixStream::pair().unwrap());
    let (near, mut far): (Vec<_>, Vec<_>) = pairs.map(|(near, far)| (channel(near), channel(far))).unzip();
    let channels = far.iter().map(StreamChannel::breaker).collect();
    let main = connect(&here, &StreamOptions::default(), &Stop::never()).unwrap();
    let connection =
        SourceConnection::over_channels(main, near, from.clone(), &ChannelOptions::default()).unwrap();
    let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(0));
    (postcopy.max_bandwidth, postcopy.reconnect_timeout) = (Rate::limit(200 << 10), Duration::from_secs(100));
    set(&mut postcopy);
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    (settings.guest_is_paused, settings.postcopy) = (true, Some(postcopy));
    let machines = (Machine::running(b"devices"), Machine::default());
    let control = Box::new(machines.0.clone());
    let source = SourceGuest { memory: from.clone(), dirty: Vec::new(), control };
    let source = SourceSession::new(source, connection, settings)
        .with_reconnect(Box::new(Redial::new(here, StreamOptions::default())));
    let control = source.control();
    let source = source.spawn().unwrap();
    far.push(next.next(&Stop::never()).unwrap());
    let stop = Stop::never().within(Duration::from_secs(100));
    let connection = DestinationConnection::over_channels(far, &ConnectionOptions::default(), &stop).unwrap();
    let arriving = DestinationGuest { memory: Box::new(to.clone()), control: Box::new(machines.1.clone()) };
    let settings = DestinationSettings { postcopy: true, ..Default::default() };
    let destination = DestinationSession::new(arriving, connection, settings)
        .with_next_connection(Box::new(next))
        .spawn()
        .unwrap();
    Running { source, destination, ends: (from, to), machines, breakers, channels, control }
}

impl Running {
    /// Waits for the end: all pages are there. Returns the bytes on page channels.
    fn finish(self) -> (SourceReport, DestinationReport) {
        self.control.set_postcopy_bandwidth(None);
        let (sent, arrived) = (self.source.wait().unwrap(), self.destination.wait().unwrap());
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(!self.machines.0.runs() && self.machines.1.runs());
        for block in 0..2 {
            assert!(bytes(&self.ends.0, block) == bytes(&self.ends.1, block), "block {block} differs");
        }
        (sent, arrived)
    }
}

/// Odd pages, which are not zero.
fn touch_odd(to: &MappedGuest, pages: std::ops::Range<u64>) {
    pages.filter(|page| page % 2 == 1).for_each(|page| touch(to, page..page + 1));
}

/// Requested pages come on the main connection, or on one of their own, while the others come on page channels.
#[test]
fn p4_p13_missing_pages_come_on_page_channels_and_requested_ones_beside_them() {
    for preempt in [false, true] {
        let running = run(|postcopy| postcopy.preempt = preempt);
        until("it runs there", || running.machines.1.runs());
        touch_odd(&running.ends.1, PAGES - 100..PAGES);
        let (sent, arrived) = running.finish();
        let missing = arrived.missing_pages.unwrap();
        assert!(missing.requests > 0 && sent.statistics.postcopy_requests > 0, "{missing:?}");
        assert_eq!(missing.preempt_pages > 0, preempt, "{missing:?}");
        let (beside, all) = (sent.statistics.multifd_bytes, sent.statistics.transferred);
        assert!(beside > PAGES / 3 * 4096 && all - beside < PAGES / 4 * 4096, "{beside} of {all}");
    }
}

/// The main connection is lost, or one page channel: the rest comes on the next connection, which has none.
#[test]
fn p9_a_connection_with_page_channels_is_followed_by_one_without() {
    for main in [true, false] {
        let running = run(|_| {});
        until("pages come on page channels", || {
            running.machines.1.runs() && running.destination.progress().multifd_bytes > 50 * 4096
        });
        let lost = running.breakers.lock().unwrap().drain(..).collect::<Vec<_>>();
        let broken = if main { &lost[..] } else { &running.channels[..1] };
        broken.iter().for_each(StreamBreaker::reset);
        until("another comes", || !running.breakers.lock().unwrap().is_empty());
        until("they go on", || running.destination.progress().status == Status::PostcopyActive);
        touch_odd(&running.ends.1, PAGES - 60..PAGES);
        running.finish();
    }
}
