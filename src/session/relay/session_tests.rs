//! A relay between a source whose pages a NIC writes and a far end on a socket.
//!
//! The NIC is a copy into the relay's memory, between the mark of a round and its end, which nothing reports. As with
//! real NICs, the source can't open a round before the relay has continued to read after the last one.
#![allow(clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::run;
use crate::engine::{Ending, Outcome};
use crate::guest::{DirtyError, DirtySource, GuestMemory, MappedGuest, Placer};
use crate::observe::{PageCounts, SharedStatistics};
use crate::ram::{MoverAbilities, PageBatch, PageBitmap, PageRun, RoundKind, Verdict};
use crate::session::tests::{Machine, Plain, bytes, guest, plain};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::ram::HOOK;
use crate::sys::{CancelToken, HostSpan, RecvPart, SendPart, Stop};
use crate::transport::{
    ByteSink, ByteSource, ChannelError, DestinationAbilities, DestinationLink, InlineLink, MoveError, Offer,
    Receipt, Returned, RoundReceived, SourceLink, Ticket,
};
use crate::units::{BlockIndex, PageIndex};

const PAGES: u64 = 1000;
/// Pages per chunk that the source is granted.
const CHUNK: u64 = 256;
/// Longest wait for the other side; exceeding it is a failure.
const WAIT: Duration = Duration::from_secs(20);

/// The relay's memory, once it exists.
type There = Arc<Mutex<Option<Arc<dyn GuestMemory>>>>;

fn run_of(first: u64, pages: u64) -> PageRun {
    PageRun { block: BlockIndex(0), first: PageIndex(first), pages }
}

fn page(memory: &dyn GuestMemory, page: u64) -> HostSpan<'_> {
    memory.span(memory.table().admit_run(run_of(page, 1)).unwrap()).unwrap()
}

fn closed(doing: &'static str) -> ChannelError {
    ChannelError::Closed { peer: "the other end".into(), doing }
}

/// The source's end.
struct NicSource {
    sink: Box<Plain>,
    from: Arc<MappedGuest>,
    there: There,
    ended: Sender<Vec<PageRun>>,
    /// The relay has read on.
    go: Receiver<()>,
    /// The relay serves the round whose mark it has read.
    serves: Receiver<()>,
    opened: Vec<u64>,
    newly_opened: Vec<PageRun>,
    returned: Vec<Returned>,
    rounds: u64,
}

impl crate::transport::Sealed for NicSource {}

impl SourceLink for NicSource {
    fn abilities(&self) -> MoverAbilities {
        MoverAbilities {
            classifies: false,
            takes_deltas: false,
            exclusive_round: true,
            confirms_placement: true,
            ordered: true,
            registers_memory: false,
            serves_reads: false,
            batches_in_flight: 1,
            batch_pages: 64,
        }
    }

    fn sink(&mut self) -> &mut dyn ByteSink {
        &mut *self.sink
    }

    fn sent_pages(&self) -> Vec<PageCounts> {
        vec![PageCounts::default()]
    }

    fn open_round(&mut self, _kind: RoundKind, stop: &Stop) -> Result<(), MoveError> {
        if self.rounds > 0 {
            self.go.recv_timeout(WAIT).map_err(|_| closed("waiting for a credit"))?;
        }
        self.rounds += 1;
        self.sink.send(&[SendPart::Own(&HOOK.to_be_bytes())], stop)?;
        // The relay does before the first page what it does before a round.
        Ok(self.serves.recv_timeout(WAIT).map_err(|_| closed("opening a round"))?)
    }

    fn offer(&mut self, batch: PageBatch, _stop: &Stop) -> Result<Offer, MoveError> {
        let there = self.there.lock().unwrap().clone().unwrap();
        for piece in batch.pieces() {
            for at in piece.run.first.0..piece.run.end().0 {
                let mut copy = [0; 4096];
                if piece.verdict != Verdict::Zero {
                    page(&*self.from, at).copy_to(&mut copy);
                }
                page(&*there, at).copy_from(&copy);
                let chunk = at / CHUNK;
                if !self.opened.contains(&chunk) {
                    self.opened.push(chunk);
                    let first = chunk * CHUNK;
                    self.newly_opened.push(run_of(first, CHUNK.min(PAGES - first)));
                }
            }
        }
        self.returned.push(Returned { ticket: Ticket(self.rounds), receipt: Receipt::Placed, batch });
        Ok(Offer::Taken(Ticket(self.rounds)))
    }

    fn collect(&mut self, out: &mut Vec<Returned>) -> Result<(), MoveError> {
        out.append(&mut self.returned);
        Ok(())
    }

    fn close_round(&mut self, _kind: RoundKind, _stop: &Stop) -> Result<(), MoveError> {
        let opened = std::mem::take(&mut self.newly_opened);
        Ok(self.ended.send(opened).map_err(|_| closed("closing a round"))?)
    }

    fn drain(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    fn reclaim(&mut self) -> Vec<PageBatch> {
        Vec::new()
    }
}

/// The relay's end.
struct NicDestination {
    stream: Box<Plain>,
    there: There,
    ended: Receiver<Vec<PageRun>>,
    go: Sender<()>,
    serving: Sender<()>,
    owes_word: bool,
    waits: bool,
}

impl crate::transport::Sealed for NicDestination {}

impl ByteSource for NicDestination {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        if std::mem::take(&mut self.owes_word) {
            // The source is gone after the last round.
            let _ = self.go.send(());
        }
        self.stream.recv(into, stop)
    }
}

impl DestinationLink for NicDestination {
    fn abilities(&self) -> DestinationAbilities {
        DestinationAbilities {
            has_rounds: true,
            waits_after_round: self.waits,
            ..DestinationAbilities::default()
        }
    }

    fn stream(&mut self) -> &mut dyn ByteSource {
        self
    }

    fn announce(&mut self, placer: &Arc<Placer>, _blocks: &AnnouncedBlocks) -> Result<(), MoveError> {
        *self.there.lock().unwrap() = Some(Arc::clone(placer.memory()));
        Ok(())
    }

    fn receive_round(&mut self, _stop: &Stop, _: Duration) -> Result<Option<RoundReceived>, MoveError> {
        self.owes_word = true;
        let _ = self.serving.send(());
        let touched = self.ended.recv_timeout(WAIT).map_err(|_| closed("serving a round"))?;
        Ok(Some(RoundReceived { touched, zero_bytes: 0 }))
    }

    fn revoke(&mut self) {}

    fn close(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }
}

/// Rounds in which the guest writes.
const WRITING: u64 = 5;

/// A guest that writes at each sync, and once more when it is paused.
struct Scribbler {
    memory: Arc<MappedGuest>,
    syncs: Mutex<u64>,
}

impl Scribbler {
    /// What sync number `at` finds written: page, byte. The first page alternates between two contents, one becomes
    /// zero, and one is in a chunk without earlier pages.
    fn writes(at: u64) -> Vec<(u64, u8)> {
        let takes_turns = (7, 1 + (at % 2) as u8);
        let becomes_zero = (300, if at == 3 { 0 } else { 9 });
        let mut writes = vec![takes_turns, becomes_zero];
        writes.extend((0..10).map(|page| (20 * at + page, 0x40 + at as u8)));
        writes.extend((at == 4).then_some((900, 0x77)));
        writes
    }
}

impl DirtySource for Scribbler {
    fn name(&self) -> &'static str {
        "scribbler"
    }
    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }
    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }
    fn sync_into(&self, _block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        let mut syncs = self.syncs.lock().unwrap();
        *syncs += 1;
        // A sync without dirty pages makes the source pause; the last sync comes after that.
        if *syncs != WRITING + 1 && *syncs <= WRITING + 2 {
            for (at, byte) in Self::writes(*syncs) {
                page(&*self.memory, at).copy_from(&[byte; 4096]);
                into.set_range(at..at + 1);
            }
        }
        Ok(())
    }
    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

struct Relayed {
    source: SourceReport,
    relay: RelayReport,
    far: DestinationReport,
    far_machine: Machine,
    equal: bool,
}

fn relayed(breakage: Breakage, waits: bool) -> Relayed {
    let [(near, relay_near), (relay_far, far)] = [(); 2].map(|()| UnixStream::pair().unwrap());
    let (from, to) = (guest(&[PAGES]), guest(&[PAGES]));
    (0..PAGES).filter(|at| at % 3 == 0 && *at < 600).for_each(|at| {
        page(&*from, at).copy_from(&[at as u8 | 1; 4096]);
    });
    let (ended, take_ended) = channel();
    let (go, take_go) = channel();
    let (serving, serves) = channel();
    let there = There::default();

    let far_machine = Machine::default();
    let control = Box::new(far_machine.clone());
    let settings = DestinationSettings::default();
    let far = DestinationSession::new(
        DestinationGuest { memory: Box::new(to.clone()), control },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        settings,
    );
    let far = std::thread::spawn(move || far.run());

    let incoming = NicDestination {
        stream: plain(&relay_near),
        there: Arc::clone(&there),
        ended: take_ended,
        go,
        serving,
        owes_word: false,
        waits,
    };
    let connect = move |memory| {
        let link = Box::new(InlineLink::new(plain(&relay_far), memory));
        Ok(SourceConnection::new(link, Some(plain(&relay_far))))
    };
    let relay = Relay {
        connection: DestinationConnection::new(Box::new(incoming), Some(plain(&relay_near))),
        connect: Box::new(connect),
        incoming: DestinationSettings::default(),
        outgoing: SourceSettings::new(Configuration::default()),
        urgent_came: false,
        urgent: None,
        huge_pages: true,
        cancel: CancelToken::default(),
        control: RelayControl::default(),
        guard: None,
        notice: Arc::new(|_: &Notice| ()),
        statistics: SharedStatistics::default(),
    };
    let relay = std::thread::spawn(move || {
        let report = run(relay, breakage);
        drop(relay_near);
        report
    });

    let link = NicSource {
        sink: plain(&near),
        from: from.clone(),
        there,
        ended,
        go: take_go,
        serves,
        opened: Vec::new(),
        newly_opened: Vec::new(),
        returned: Vec::new(),
        rounds: 0,
    };
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    // Only a sync without dirty pages makes it pause.
    settings.downtime_limit = Duration::ZERO;
    let machine = Machine::running(b"devices");
    let scribbler = Arc::new(Scribbler { memory: from.clone(), syncs: Mutex::default() });
    let source =
        SourceGuest { memory: from.clone(), dirty: vec![scribbler], control: Box::new(machine.clone()) };
    let connection = SourceConnection::new(Box::new(link), Some(plain(&near)));
    let source = SourceSession::new(source, connection, settings).run();
    drop(near);
    let (relay, far) = (relay.join().unwrap(), far.join().unwrap());
    assert_eq!(machine.runs(), source.outcome != Outcome::Completed);
    Relayed { equal: bytes(&from, 0) == bytes(&to, 0), source, relay, far, far_machine }
}

#[test]
fn pages_that_a_nic_wrote_in_later_rounds_and_in_the_last_one_reach_the_far_end() {
    let Relayed { source, relay, far, far_machine, equal } = relayed(Breakage::None, true);
    assert_eq!(source.outcome, Outcome::Completed, "{source:?} {relay:?} {far:?}");
    assert_eq!(far.ending, Ending::Running, "{far:?}");
    assert!(equal && far_machine.runs(), "{relay:?}");
    let sent = relay.sent.unwrap();
    let rounds = source.statistics.rounds.len() as u32;
    assert_eq!(u64::from(rounds), WRITING + 1, "every sync was followed by a round: {source:?}");
    let scan = relay.received.scan.unwrap();
    assert_eq!(scan.scans, rounds, "one a round: {scan:?}");
    assert_eq!(scan.memory, PAGES * 16);
    assert!(scan.found > PAGES && scan.found < 2 * PAGES, "what did not change is not sent again: {scan:?}");
    let parts = sent.statistics.downtime_parts;
    assert!(parts.scan_ms > 0.0 && parts.scan_ms == scan.last.as_secs_f64() * 1e3, "{parts:?}");
    assert!((sent.statistics.downtime - parts.total_ms()).abs() < 1e-6, "{parts:?}");
}

#[test]
fn a_scan_before_the_last_round_loses_its_pages() {
    // On a busy machine a page that was found early may be read so late that it already holds the last round's bytes.
    let lost = (0..20).any(|_| {
        let Relayed { source, equal, .. } = relayed(Breakage::ScanBeforeFinish, true);
        assert_eq!(source.outcome, Outcome::Completed, "nobody notices: {source:?}");
        !equal
    });
    assert!(lost, "the last round's pages are found whenever they are looked for");
}

#[test]
fn a_source_that_may_write_during_a_scan_is_refused() {
    let Relayed { source, relay, far, far_machine, .. } = relayed(Breakage::None, false);
    assert!(matches!(source.outcome, Outcome::StaysHere(_)), "{source:?}");
    let error = crate::error::Chain(&relay.received.error.unwrap()).to_string();
    assert!(error.contains("wait_after_round"), "{error}");
    assert!(far.ending != Ending::Running && !far_machine.runs());
}
