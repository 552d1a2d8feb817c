//! A small guest that writes and checks itself, and the two sessions that move it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::guest::{DeviceState, GuestControl, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    DestinationConnection, DestinationGuest, DestinationReport, DestinationSession, DestinationSettings,
    Peer, SourceConnection, SourceGuest, SourceReport, SourceSession, SourceSettings, Verify,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::Mapping;
use ramwire::transport::{ByteSink, ByteSource, InlineLink, StreamChannel, StreamOptions};
use ramwire::units::{PageSize, Rate};

use crate::common::Deadline;

/// Pages of each block.
pub(crate) const BLOCKS: [u64; 3] = [24, 5, 1];
pub(crate) const PAGES: u64 = 30;
pub(crate) const PAGE: u64 = 4096;
/// Time that no healthy step takes, on however busy a machine.
pub(crate) const PATIENT: Duration = Duration::from_secs(30);

/// Fresh zero memory.
pub(crate) fn memory() -> Arc<MappedGuest> {
    let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
    for (index, pages) in BLOCKS.iter().enumerate() {
        let mapping = Mapping::anonymous(pages * PAGE).unwrap();
        let name = BlockName::new(&format!("block{index}")).unwrap();
        builder = builder.mapping(RamBlock::new(name, pages * PAGE), &mapping);
    }
    Arc::new(builder.build().unwrap())
}

/// A guest on one side; clones are the same guest.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) memory: Arc<MappedGuest>,
    pub(crate) guest: SyntheticGuest,
    runs: Arc<AtomicBool>,
}

impl Live {
    /// A filled guest that runs and writes `pages` pages a second.
    pub(crate) fn running(seed: u64, pages: u64) -> Self {
        let memory = memory();
        let config = SyntheticConfig {
            seed,
            working_set: 8 * PAGE,
            rate: Some(Rate(pages * PAGE)),
            writers: 1,
            ..SyntheticConfig::default()
        };
        let guest = SyntheticGuest::filled(Arc::clone(&memory), config).unwrap();
        let mut live = Self { memory, guest, runs: Arc::default() };
        live.resume().unwrap();
        live
    }

    /// An empty guest: a guest may arrive in its memory.
    pub(crate) fn empty() -> Self {
        let memory = memory();
        Self { guest: SyntheticGuest::empty(Arc::clone(&memory)), memory, runs: Arc::default() }
    }

    pub(crate) fn runs(&self) -> bool {
        self.runs.load(Ordering::Acquire)
    }

    /// Every page holds what the guest wrote last.
    pub(crate) fn assert_whole(&self, what: &str) {
        let mut guest = self.guest.clone();
        guest.pause().unwrap();
        let found = guest.verify().unwrap();
        assert!(found.is_whole(), "{what}: {:?}", found.faults);
        if self.runs() {
            guest.resume().unwrap();
        }
    }

    /// It runs, writes on, and is whole.
    pub(crate) fn assert_runs_on(&self, what: &str) {
        assert!(self.runs(), "{what}: the guest stands still");
        let before = self.guest.pages_written();
        let state = || format!("{before} pages written");
        Deadline::seconds(10).poll(&format!("{what}: the guest writes"), state, || {
            (self.guest.pages_written() > before).then_some(())
        });
        self.assert_whole(what);
    }
}

impl GuestControl for Live {
    fn pause(&mut self) -> io::Result<()> {
        self.runs.store(false, Ordering::Release);
        self.guest.pause()
    }
    fn resume(&mut self) -> io::Result<()> {
        self.runs.store(true, Ordering::Release);
        self.guest.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        self.guest.devices()
    }
}

/// A connection inside this process.
pub(crate) fn pair(stall: Duration) -> (StreamChannel, StreamChannel) {
    let (near, far) = UnixStream::pair().unwrap();
    (channel(near, stall), channel(far, stall))
}

pub(crate) fn channel(socket: UnixStream, stall: Duration) -> StreamChannel {
    StreamChannel::from_fd(socket.into(), "the peer", &options(stall)).unwrap()
}

pub(crate) fn options(stall: Duration) -> StreamOptions {
    let mut options = StreamOptions::default();
    options.stall = Some(stall);
    options
}

pub(crate) fn settings(patience: Duration) -> SourceSettings {
    let machine = "ramwire-test".into();
    let mut settings = SourceSettings::new(Configuration { machine, ..Configuration::default() });
    settings.verify = Verify::Full;
    settings.peer = Some(Peer::Ramwire);
    settings.migration_id = *b"the one and only";
    (settings.stall_timeout, settings.finish_timeout) = (patience, patience);
    settings
}

pub(crate) fn source(
    live: &Live,
    control: Box<dyn GuestControl>,
    sink: Box<dyn ByteSink>,
    back: Box<dyn ByteSource>,
    settings: SourceSettings,
) -> SourceSession {
    let guest = SourceGuest { memory: live.memory.clone(), dirty: vec![live.guest.software()], control };
    let link = Box::new(InlineLink::new(sink, live.memory.clone()));
    SourceSession::new(guest, SourceConnection::new(link, Some(back)), settings)
}

pub(crate) fn destination_settings(patience: Duration) -> DestinationSettings {
    let mut settings = DestinationSettings::default();
    settings.stall_timeout = patience;
    settings.finish_timeout = patience;
    settings.max_ram = 1 << 30;
    settings.max_state = 1 << 20;
    settings
}

pub(crate) fn destination(
    live: &Live,
    from: Box<dyn ByteSource>,
    back: Box<dyn ByteSink>,
    patience: Duration,
) -> DestinationSession {
    let (memory, control) = (Box::new(live.memory.clone()), Box::new(live.clone()));
    DestinationSession::new(
        DestinationGuest { memory, control },
        DestinationConnection::of_stream(from, Some(back)),
        destination_settings(patience),
    )
}

/// Moves `live` without a fault, checks it at the other end, and takes it back to run here.
pub(crate) fn migrate_cleanly(live: &Live, what: &str) {
    let (near, far) = pair(PATIENT);
    let there = Live::empty();
    let (sink, back) = near.split();
    let (from, answer) = far.split();
    let target = destination(&there, Box::new(from), Box::new(answer), PATIENT);
    let arriving = std::thread::spawn(move || target.run());
    let control = Box::new(live.clone());
    let sent = source(live, control, Box::new(sink), Box::new(back), settings(PATIENT)).run();
    let arrived = arriving.join().unwrap();
    assert_moved(what, live, &there, &sent, &arrived);
    drop(there);
    live.clone().resume().unwrap();
}

pub(crate) fn assert_moved(
    what: &str,
    here: &Live,
    there: &Live,
    sent: &SourceReport,
    arrived: &DestinationReport,
) {
    let errors = (&sent.error, &arrived.error);
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running), "{what}: {errors:?}");
    assert!(arrived.verified && !here.runs() && there.runs(), "{what}: {errors:?}");
    there.assert_whole(what);
}

/// The migration has failed at the source, and nothing is lost there.
pub(crate) fn assert_stayed(what: &str, live: &Live, sent: &SourceReport) {
    assert!(sent.guest_is_safe_here(), "{what}: {:?}: {:?}", sent.outcome, sent.error);
    let error = sent.error.as_ref().unwrap_or_else(|| panic!("{what}: no reason is given"));
    assert!(error.to_string().len() > 10, "{what}: {error}");
    assert_eq!(sent.dirty.count(), PAGES, "{what}: every page is dirty again");
    assert!(live.runs(), "{what}: the guest stands still at the source");
}

/// Keeps what passes.
pub(crate) struct Recorder<T> {
    pub(crate) inner: T,
    pub(crate) bytes: Arc<Mutex<Vec<u8>>>,
}

impl<T> ramwire::transport::Sealed for Recorder<T> {}

impl<T: ByteSink> ByteSink for Recorder<T> {
    fn send(
        &mut self,
        parts: &[ramwire::sys::SendPart<'_>],
        stop: &ramwire::sys::Stop,
    ) -> Result<(), ramwire::transport::ChannelError> {
        let mut bytes = self.bytes.lock().unwrap();
        for part in parts {
            match part {
                ramwire::sys::SendPart::Own(own) => bytes.extend_from_slice(own),
                ramwire::sys::SendPart::Guest(span) => {
                    let mut copy = vec![0; span.len()];
                    span.copy_to(&mut copy);
                    bytes.extend(copy);
                }
            }
        }
        drop(bytes);
        self.inner.send(parts, stop)
    }
    fn flush(&mut self, stop: &ramwire::sys::Stop) -> Result<(), ramwire::transport::ChannelError> {
        self.inner.flush(stop)
    }
    fn position(&self) -> u64 {
        self.inner.position()
    }
}
