//! A running guest by a socket or by page channels: to the end, cancelled, broken, or with a switch to postcopy.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use ramwire::engine::{Ending, Outcome, PostcopyRule, Reason};
use ramwire::guest::{DirtySource, GuestMemory, MappedGuest, WrittenPages};
use ramwire::observe::RunDescription;
use ramwire::ram::RamBlock;
use ramwire::session::{
    CancelReply, DestinationConnection, DestinationGuest, DestinationSession, DestinationSettings, Error,
    Incoming, MemoryProvider, PostcopySettings, RunLog, SourceConnection, SourceGuest, SourceSession,
    SourceSettings, Spawner, Verify,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{
    AllowList, ChannelOptions, ConnectionOptions, Listener, Numa, PageSending, StreamBreaker, StreamChannel,
    StreamOptions, open_source,
};
use ramwire::units::{PageSize, Rate};
use seccompiler::BpfProgram;

use super::machine::{Machine, Paced, rest, spawner};
use super::{SLOW, STALL};

/// A destination that also takes time before it has memory: it reports that it is asked, and waits until it may
/// continue.
struct Slow {
    machine: Machine,
    asked: mpsc::Sender<()>,
    go: mpsc::Receiver<()>,
}

impl MemoryProvider for Slow {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        self.asked.send(()).unwrap();
        rest(SLOW);
        self.go.recv().unwrap();
        if !incoming.passed.is_empty() {
            let none = |block: &RamBlock| panic!("{} was not passed", block.name);
            return Ok(incoming.map(PageSize::SIZE_4K, none)?);
        }
        self.machine.memory.provide(incoming)
    }
}

fn pair(way: &str) -> [OwnedFd; 2] {
    if way != "tcp" {
        let (near, far) = UnixStream::pair().unwrap();
        return [near.into(), far.into()];
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    [near.into(), listener.accept().unwrap().0.into()]
}

/// A connection: the source's end, and the destination's once the source's session runs.
struct Connected {
    near: SourceConnection,
    far: Box<dyn FnOnce() -> DestinationConnection>,
    breaker: Option<StreamBreaker>,
}

fn connected(way: &str, memory: &Arc<MappedGuest>, spawner: &Spawner) -> Connected {
    let sending = match way {
        "channels" => Some(PageSending::Copy),
        "spliced" => Some(PageSending::Splice),
        "lent" => Some(PageSending::ZeroCopy),
        _ => None,
    };
    if let Some(sending) = sending {
        return with_channels(memory, spawner, sending);
    }
    let [near, far] =
        pair(way).map(|fd| StreamChannel::from_fd(fd, "peer", &StreamOptions::default()).unwrap());
    let breaker = far.breaker();
    let far = move || DestinationConnection::over(far);
    let near = SourceConnection::over(near, memory.clone());
    Connected { near, far: Box::new(far), breaker: Some(breaker) }
}

/// The same with two page channels. Which connection is the main one shows in its first bytes.
fn with_channels(memory: &Arc<MappedGuest>, spawner: &Spawner, sending: PageSending) -> Connected {
    let stop = Stop::on(&CancelToken::default());
    let mut channels = ChannelOptions::default();
    channels.count = 2;
    channels.sending = sending;
    channels.numa = Numa::Auto;
    channels.spawn = spawner.callback();
    let mut options = ConnectionOptions::default();
    options.channels = channels;
    let mut listener =
        Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), AllowList::default(), &stop).unwrap();
    let near = open_source(listener.address(), memory.clone(), &options, &stop).unwrap();
    let far = move || listener.accept_connection(&options, &stop).unwrap();
    Connected { near, far: Box::new(far), breaker: None }
}

pub(crate) fn migrate(way: &str, end: &str, dirty: &str, filters: Option<HashMap<String, BpfProgram>>) {
    let (here, there) = (Machine::new(), Machine::new());
    let writer = here.start();
    let spawner = spawner(filters);
    let Connected { near: link, far, breaker } = connected(way, &here.memory, &spawner);
    let mut arrives = DestinationSettings::default();
    arrives.spawner = spawner.clone();
    arrives.stall_timeout = STALL;
    let dirty: Arc<dyn DirtySource> = match dirty {
        "software" => here.written.clone(),
        _ => Arc::new(WrittenPages::new(&*here.memory)),
    };
    let dirty: Arc<dyn DirtySource> = Arc::new(Paced::new(dirty, &here));
    let guest =
        SourceGuest { memory: here.memory.clone(), dirty: vec![dirty], control: Box::new(here.clone()) };
    let mut settings = SourceSettings::new(Configuration::default());
    settings.verify = Verify::Full;
    settings.spawner = spawner.clone();
    settings.downtime_limit = Duration::from_millis(20);
    (settings.pass_memory, arrives.take_memory) = (way == "passed", way == "passed");
    if end == "postcopy" {
        settings.verify = Verify::Off;
        let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(0));
        // Requested pages are sent at once, the rest so slowly that it is missing when it is touched.
        postcopy.max_bandwidth = Rate::limit(4 << 20);
        settings.postcopy = Some(postcopy);
        arrives.postcopy = true;
    }
    let leaving = SourceSession::new(guest, link, settings);
    let lines = tempfile::tempfile().unwrap();
    let out = Box::new(lines.try_clone().unwrap());
    let log = RunLog::start(leaving.statistics(), RunDescription::default(), out, &spawner).unwrap();
    let leaving = leaving.spawn().unwrap();
    let connection = far();
    let ((asked, is_asked), (may, go)) = (mpsc::channel(), mpsc::channel());
    let (provider, control) = (Box::new(Slow { machine: there.clone(), asked, go }), Box::new(there.clone()));
    let arriving =
        DestinationSession::new(DestinationGuest { memory: provider, control }, connection, arrives)
            .spawn()
            .unwrap();
    // A failure shows in what the sessions report.
    let _ = is_asked.recv();
    let (outcome, ending) = match end {
        "cancelled" => {
            assert_eq!(leaving.cancel(), CancelReply::Accepted);
            (Outcome::StaysHere(Reason::Cancelled), Ending::Discarded)
        }
        "broken" => {
            breaker.unwrap().close();
            (Outcome::StaysHere(Reason::Failed), Ending::Discarded)
        }
        _ => (Outcome::Completed, Ending::Running),
    };
    let _ = may.send(());
    let (left, arrived) = (leaving.wait().unwrap(), arriving.wait().unwrap());
    assert_eq!((left.outcome, arrived.ending), (outcome, ending), "{:?} {:?}", left.error, arrived.error);
    log.finish().unwrap();
    assert!(lines.metadata().unwrap().len() > 0, "the log is written");
    here.ended.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    if way == "passed" {
        assert_eq!((left.passed.len(), left.statistics.pages.normal), (1, 0));
    } else if outcome == Outcome::Completed {
        assert!(arrived.verified == (end != "postcopy") && here.bytes() == there.bytes());
    }
    println!("migrated");
}
