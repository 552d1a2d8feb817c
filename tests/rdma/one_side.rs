//! A network that swallows everything, at COMMIT of a migration by RDMA and for a while under one by TCP.

use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::guest::{GuestControl, MappedGuest};
use ramwire::observe::LostConnections;
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    Configuration, DestinationGuest, DestinationReport, DestinationSession, DestinationSettings, Redial,
    SourceGuest, SourceReport, SourceSession, SourceSettings, Verify,
};
use ramwire::sys::{Mapping, Stop};
use ramwire::transport::rdma::{RdmaListener, connect_over};
use ramwire::transport::{Address, AllowList, Listener, RdmaOptions, StreamOptions};
use ramwire::units::{PageSize, Rate};
use rdma_hooks::tap::{Posting, Tapped};
use rdma_hooks::verbs::VerbsFabric;
use serde_json::json;

use crate::common::{
    Deadline,
    memory::{MIB, Pattern, compare, fill},
    ramwire::Ramwire,
    scratch,
};
use crate::memory_file;
use crate::network::{End, FAR, Network};

const RAM: u64 = 6 << 20;

/// First bytes of COMMIT.
const COMMIT: &[u8] = &[8, 0x52, 4, 0, 16];

// --- at an exact moment -----------------------------------------------------------------------------

fn memory() -> Arc<MappedGuest> {
    let mapping = Mapping::anonymous(RAM).unwrap();
    let block = RamBlock::new(BlockName::new("ram").unwrap(), RAM);
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap())
}

type Tap = Arc<dyn Fn(Posting<'_>) + Send + Sync>;

fn fabric(tap: &Tap) -> Arc<Tapped<VerbsFabric>> {
    let tap = Arc::clone(tap);
    Arc::new(Tapped::new(VerbsFabric::open().unwrap(), move |posting| tap(posting)))
}

/// A guest that writes, on its way from one end of a network to the other.
struct Migration {
    source: JoinHandle<SourceReport>,
    destination: JoinHandle<DestinationReport>,
    from: SyntheticGuest,
    to: SyntheticGuest,
}

impl Migration {
    /// `near` and `far` are called for what either end is about to post.
    fn start(rate: u64, near: &Tap, far: &Tap) -> Self {
        let mut config = SyntheticConfig::default();
        (config.working_set, config.rate, config.writers) = (1 << 20, Some(Rate(300 << 10)), 1);
        let from = SyntheticGuest::filled(memory(), config).unwrap();
        let to = SyntheticGuest::empty(memory());
        let stop = Stop::never();
        let fallback = Address::tcp("127.0.0.1", 0);
        let mut fallback = Listener::bind(&fallback, AllowList::default(), &stop).unwrap();
        let again = Redial::new(fallback.address().clone(), StreamOptions::default());
        let mut listener = RdmaListener::bind(fabric(far), FAR, 0, AllowList::default()).unwrap();
        let (_, port) = listener.address().host_and_port().unwrap();
        let arriving = to.clone();
        let destination = thread::spawn(move || {
            let accepted =
                listener.accept(&StreamOptions::default(), &RdmaOptions::default(), &Stop::never());
            let mut settings = DestinationSettings::default();
            settings.reconnect_timeout = Duration::from_secs(120);
            let guest = DestinationGuest {
                memory: Box::new(Arc::clone(arriving.memory())),
                control: Box::new(arriving),
            };
            let next = move |stop: &Stop| fallback.accept(&StreamOptions::default(), stop);
            DestinationSession::new(guest, accepted.unwrap(), settings)
                .with_next_connection(Box::new(next))
                .run()
        });
        let (guest, fabric) = (from.clone(), fabric(near));
        let source = thread::spawn(move || {
            let mut guest = guest;
            guest.resume().unwrap();
            let memory = Arc::clone(guest.memory());
            let (options, rdma) = (StreamOptions::default(), RdmaOptions::default());
            let connection =
                connect_over(fabric, FAR, port, Arc::clone(&memory) as _, &options, &rdma, &stop).unwrap();
            let machine = Configuration { machine: "test".into(), ..Configuration::default() };
            let mut settings = SourceSettings::new(machine);
            settings.reconnect_timeout = Duration::from_secs(120);
            settings.max_bandwidth = Rate::limit(rate);
            settings.verify = Verify::Fast;
            let dirty = vec![guest.software() as _];
            let guest = SourceGuest { memory, dirty, control: Box::new(guest) };
            SourceSession::new(guest, connection, settings).with_reconnect(Box::new(again)).run()
        });
        Self { source, destination, from, to }
    }

    /// Waits for its end. The guest is at the destination, whole, and nowhere else.
    fn arrives(mut self) -> LostConnections {
        let (source, destination) = (self.source.join().unwrap(), self.destination.join().unwrap());
        let told = format!("{:?} {:?}", source.error, destination.error);
        assert_eq!((source.outcome, destination.ending), (Outcome::Completed, Ending::Running), "{told}");
        self.to.pause().unwrap();
        assert!(self.to.verify().unwrap().is_whole(), "{:?}", self.to.verify());
        assert!(source.not_resumed && destination.verified, "{told}");
        let written = self.from.pages_written();
        assert!(
            written > 0 && self.to.pages_written() >= written,
            "{written} pages were written at the source"
        );
        let lost = source.statistics.lost;
        println!("{}", serde_json::to_string(&lost).unwrap());
        assert!(lost.pages_again <= RAM / 4096 && lost.bytes_again == lost.pages_again * 4096, "{lost:?}");
        assert!(lost.last.iter().all(|lost| lost.took_ms.is_some()), "{lost:?}");
        lost
    }
}

fn nothing() -> Tap {
    Arc::new(|_| {})
}

/// Calls `lose` when a message that holds `word` is about to be posted.
fn at_word(word: &'static [u8], lose: impl FnOnce() + Send + 'static) -> Tap {
    let lose = Mutex::new(Some(lose));
    Arc::new(move |posting| {
        let Posting::Message(parts) = posting else { return };
        if parts.concat().windows(word.len()).any(|found| found == word)
            && let Some(lose) = lose.lock().unwrap().take()
        {
            lose();
        }
    })
}

/// COMMIT does not arrive: the guest is asked for over TCP, and there is no doubt.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_network_that_is_lost_at_commit_leaves_no_doubt() {
    let network = Arc::new(Network::new());
    let loses = Arc::clone(&network);
    let near = at_word(COMMIT, move || loses.swallow(End::Near));
    let lost = Migration::start(8 << 20, &near, &nothing()).arrives();
    network.pass(End::Near);
    assert!(lost.count == 1 && lost.last[0].committed && lost.pages_again == 0, "{lost:?}");
}

// --- TCP, and a network that swallows everything ------------------------------------------------------------------------

/// For one, five and twenty seconds nothing arrives: what is shorter than the stall timeout is no loss.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_migration_by_tcp_survives_a_network_that_is_down_for_a_while() {
    let (network, dir) = (Network::new(), scratch());
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 8, Pattern::Mixed { seed: 64 });
    let patience = ["--reconnect", "120", "--stall-timeout", "4", "--json"];
    let way = format!("tcp:{FAR}:0");
    let mut receiver =
        Ramwire::start(dir.path(), &[&["receive", &way], &patience[..], &["--dir"]].concat(), &folder);
    let (uri, block) = (receiver.listening(), format!("m0={}", ram.display()));
    let more = ["--max-bandwidth", "1M", "--verify", "fast", "--ram"];
    let mut sender = Ramwire::start(dir.path(), &[&["send", &uri], &patience[..], &more].concat(), block);
    for seconds in [1, 5, 20] {
        network.carries(End::Near, 600 << 10, || sender.errors());
        network.swallow(End::Near);
        thread::sleep(Duration::from_secs(seconds));
        network.pass(End::Near);
    }
    let sent = sender.finished(Deadline::seconds(100), 0);
    let arrived = receiver.finished(Deadline::seconds(20), 0);
    assert_eq!((&sent["status"], &arrived["verified"]), (&json!("completed"), &json!(true)), "{sent}");
    compare(&ram, &memory_file(&folder)).unwrap_or_else(|found| panic!("{found:?}"));
    let lost = &sent["lost-connections"];
    println!("{lost}");
    assert!((1..10).contains(&lost["count"].as_u64().unwrap()), "{lost}");
    assert!(lost["pages_again"].as_u64().unwrap() < (8 * MIB / 4096) as u64, "{lost}");
}
