//! A whole migration whose threads may make only the system calls that docs/seccomp.json lists, with the ioctls that it
//! names; docs/embedding.md says what each is for.
//!
//! A thread that makes another call ends its process by SIGSYS, so each migration runs in a process of its
//! own: this program again, with one ignored test and a scenario in the environment.
#![allow(clippy::unwrap_used)]
#![cfg(target_arch = "x86_64")]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Output;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::engine::{Ending, Outcome, PostcopyRule, Reason};
use ramwire::guest::{
    DeviceState, DirtyError, DirtySource, GuestControl, GuestMemory, MappedGuest, SoftwareBitmap,
    TestMachine, WrittenPages,
};
use ramwire::observe::RunDescription;
use ramwire::ram::{BlockName, PageBitmap, PageRun, RamBlock};
use ramwire::session::{
    CancelReply, DestinationConnection, DestinationGuest, DestinationSession, DestinationSettings, Error,
    Incoming, Job, MemoryProvider, NextConnection, PostcopySettings, RestoreSession, RestoreSettings,
    RestoreWay, RunLog, SourceConnection, SourceGuest, SourceSession, SourceSettings, Spawner,
};
use ramwire::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use ramwire::stream::qemu::command::{Command, encode_discards};
use ramwire::stream::qemu::file::{self, Configuration};
use ramwire::stream::qemu::package::encode_package;
use ramwire::stream::qemu::ram;
use ramwire::stream::qemu::return_path::Message;
use ramwire::stream::qemu::section::{SectionName, encode_end, encode_eof, encode_footer, encode_start};
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{
    Address, AllowList, ChannelError, ChannelOptions, ConnectionOptions, Listener, Numa, OpenError,
    PageSending, StreamBreaker, StreamChannel, StreamOptions, open_source,
};
use ramwire::units::{BlockIndex, BlockOffset, PageSize, Rate};
use seccompiler::{BpfProgram, TargetArch, apply_filter, compile_from_json};
use serde_json::Value;

/// How the child learns what to do: `WAY END DIRTY-SOURCE FILTERS`. With the way `file` the end is `completed`.
const SCENARIO: &str = "RAMWIRE_SECCOMP_SCENARIO";
const PAGES: u64 = 24 << 8;
/// Longer than a wait goes on without a look at the connection.
const SLOW: Duration = Duration::from_millis(1500);
/// A quarter of it is shorter than [`SLOW`]: while the destination loads, it reports to the source that it is at work.
const STALL: Duration = Duration::from_secs(5);

type Calls = BTreeMap<String, BTreeSet<String>>;

/// The calls of each thread, from the tables of docs/embedding.md: threads head the columns, calls the rows.
fn documented() -> Calls {
    let mut calls = Calls::new();
    let mut threads: Vec<String> = Vec::new();
    for line in include_str!("../docs/embedding.md").lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let code = |cell: &str| cell.strip_prefix('`')?.strip_suffix('`').map(str::to_owned);
        if cells[0] == "system call" {
            threads = cells[1..].iter().map_while(|cell| code(cell)).collect();
        } else if !line.starts_with('|') {
            threads.clear();
        } else if let Some(call) = code(cells[0]) {
            for (thread, cell) in threads.iter().zip(&cells[1..]) {
                assert!(matches!(*cell, "yes" | ""), "{line}");
                let of_thread = calls.entry(thread.clone()).or_default();
                assert!(cell.is_empty() || of_thread.insert(call.clone()), "{call} stands there twice");
            }
        }
    }
    calls
}

/// The filters of docs/seccomp.json, one a thread. Any other call ends the process.
fn listed() -> Value {
    serde_json::from_str(include_str!("../docs/seccomp.json")).unwrap()
}

/// The rules of a thread's filter.
fn rules<'a>(filters: &'a mut Value, thread: &str) -> &'a mut Vec<Value> {
    filters[thread]["filter"].as_array_mut().unwrap()
}

#[test]
fn the_filters_list_the_calls_of_the_tables() {
    let mut filters = listed();
    let threads: Vec<String> = filters.as_object().unwrap().keys().cloned().collect();
    let named = |rule: &Value| rule["syscall"].as_str().unwrap().to_owned();
    let calls: Calls = threads
        .into_iter()
        .map(|thread| {
            let calls = rules(&mut filters, &thread).iter().map(named).collect();
            (thread, calls)
        })
        .collect();
    assert_eq!(calls, documented());
}

/// The kernel keeps 15 characters of a name (pthread_setname_np(3)): two longer ones look alike in `top -H`.
#[test]
fn names_of_threads_fit_the_kernel_and_are_documented() {
    let table = include_str!("../docs/embedding.md");
    let mut found = BTreeSet::new();
    let mut folders = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let is_cli = path.components().any(|part| part.as_os_str() == "cli");
            // A thread's name follows the call that starts it, on its line or the next.
            for call in ["spawn(", "name(", "map(", "map_watched(", ".spawn)(", "start("] {
                for (at, _) in text.match_indices(call) {
                    let rest = text[at + call.len()..].split_once("\"ramwire-");
                    let Some((between, rest)) = rest.filter(|(between, _)| between.len() < 60) else {
                        continue;
                    };
                    if between.contains([';', '{']) {
                        continue;
                    }
                    let name = format!("ramwire-{}", rest.split('"').next().unwrap());
                    assert!(name.len() <= 15, "{name} in {}", path.display());
                    assert!(
                        is_cli || table.contains(&format!("| `{name}` |")),
                        "{name} is not in docs/embedding.md"
                    );
                    found.insert(name);
                }
            }
        }
    }
    for name in ["ramwire-source", "ramwire-dest", "ramwire-chan-tx", "ramwire-faults", "ramwire-log"] {
        assert!(found.contains(name), "{name} was not found: {found:?}");
    }
}

/// Starts threads from a thread of its own, which no filter holds, and puts each under its filter.
fn spawner(filters: Option<HashMap<String, BpfProgram>>) -> Spawner {
    type Request = (&'static str, Job, mpsc::Sender<io::Result<JoinHandle<()>>>);
    let (ask, asked) = mpsc::channel::<Request>();
    let filters = Arc::new(filters);
    std::thread::spawn(move || {
        for (name, job, answer) in asked {
            let filters = Arc::clone(&filters);
            let filtered = move || {
                if let Some(filters) = &*filters {
                    let filter = filters.get(name);
                    apply_filter(filter.unwrap_or_else(|| panic!("no calls are listed for {name}"))).unwrap();
                }
                job();
            };
            let started = std::thread::Builder::new().name(name.to_owned()).spawn(filtered);
            answer.send(started).unwrap();
        }
    });
    Spawner::new(move |name, job| {
        let (answer, started) = mpsc::channel();
        ask.send((name, job, answer)).map_err(|_| io::Error::other("nobody starts threads"))?;
        started.recv().map_err(io::Error::other)?
    })
}

/// A guest whose writer is a thread that no filter holds.
#[derive(Clone)]
struct Machine {
    memory: Arc<MappedGuest>,
    written: Arc<SoftwareBitmap>,
    runs: Arc<Mutex<bool>>,
    ended: Arc<AtomicBool>,
    /// Pages that the writer may have written by now.
    allowed: Arc<AtomicU64>,
}

impl Machine {
    fn new() -> Self {
        let ram = Mapping::memfd("ram", PAGES * 4096).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
        let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap();
        let written = Arc::new(SoftwareBitmap::new(memory.table()));
        let allowed = Arc::default();
        Self { memory: Arc::new(memory), written, runs: Arc::default(), ended: Arc::default(), allowed }
    }

    fn write(&self, page: u64, value: u64) {
        let landing = self.memory.table().admit(BlockIndex(0), BlockOffset(page * 4096), 8).unwrap();
        self.memory.span(landing).unwrap().copy_from(&value.to_le_bytes());
        self.written.mark(landing);
    }

    /// Fills most pages, then writes one after the other while it runs, as far as [`Paced`] allows.
    fn start(&self) -> JoinHandle<()> {
        (0..PAGES).filter(|page| page % 5 > 0).for_each(|page| self.write(page, page));
        *self.runs.lock().unwrap() = true;
        let machine = self.clone();
        std::thread::spawn(move || {
            let mut step = 0_u64;
            while !machine.ended.load(Ordering::Relaxed) {
                let runs = machine.runs.lock().unwrap();
                if *runs && step < machine.allowed.load(Ordering::Relaxed) {
                    step += 1;
                    machine.write(step * 7 % PAGES, step);
                    continue;
                }
                drop(runs);
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    }

    fn bytes(&self) -> Vec<u8> {
        let region = self.memory.region(BlockIndex(0)).unwrap();
        let mut out = vec![0; region.len() as usize];
        region.span(0, region.len()).unwrap().copy_to(&mut out);
        out
    }
}

impl GuestControl for Machine {
    fn pause(&mut self) -> io::Result<()> {
        *self.runs.lock().unwrap() = false;
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        *self.runs.lock().unwrap() = true;
        Ok(())
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Machine {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        rest(SLOW);
        out.write_all(&[7; 1000])
    }
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        self.ended.store(true, Ordering::Relaxed);
        // Devices touch memory: in postcopy a page that is missing.
        let page = self.memory.table().admit(BlockIndex(0), BlockOffset((PAGES - 2) * 4096), 8).unwrap();
        self.memory.span(page).unwrap().copy_to(&mut [0; 8]);
        rest(SLOW);
        from.read_to_end(&mut Vec::new()).map(drop)
    }
}

/// Allows the guest a quarter as many writes after each sync as after the one before, and none in the end: on however slow
/// a machine, what is left fits the downtime after at most eight rounds.
struct Paced {
    source: Arc<dyn DirtySource>,
    machine: Machine,
    next: AtomicU64,
}

impl Paced {
    fn new(source: Arc<dyn DirtySource>, machine: &Machine) -> Self {
        Self { source, machine: machine.clone(), next: AtomicU64::new(PAGES / 4) }
    }
}

impl DirtySource for Paced {
    fn name(&self) -> &'static str {
        self.source.name()
    }
    fn probe(&self) -> Result<(), DirtyError> {
        self.source.probe()
    }
    fn start(&self) -> Result<(), DirtyError> {
        self.source.start()
    }
    fn begin_sync(&self) -> Result<(), DirtyError> {
        let next = self.next.load(Ordering::Relaxed);
        self.next.store(next / 4, Ordering::Relaxed);
        self.machine.allowed.fetch_add(next, Ordering::Relaxed);
        self.source.begin_sync()
    }
    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        self.source.sync_into(block, into)
    }
    fn reprotect(&self, run: PageRun) -> Result<(), DirtyError> {
        self.source.reprotect(run)
    }
    fn stop(&self) -> Result<(), DirtyError> {
        self.source.stop()
    }
}

/// Keeps the peer waiting, so that it looks at its connection. A wait for a lock: no call of its own.
fn rest(time: Duration) {
    let (_give, take) = mpsc::channel::<()>();
    assert_eq!(take.recv_timeout(time), Err(mpsc::RecvTimeoutError::Timeout));
}

/// A destination that takes its time before it has memory, too: it tells that it is asked, and waits until it may go on.
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
        self.machine.memory.provide(incoming)
    }
}

fn pair(way: &str) -> [OwnedFd; 2] {
    if way == "unix" {
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

fn migrate(way: &str, end: &str, dirty: &str, filters: Option<HashMap<String, BpfProgram>>) {
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
    settings.digest = true;
    settings.spawner = spawner.clone();
    settings.downtime_limit = Duration::from_millis(20);
    if end == "postcopy" {
        settings.digest = false;
        let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(0));
        // What is asked for comes at once, the rest so slowly that it is missing when it is touched.
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
    if outcome == Outcome::Completed {
        assert!(arrived.verified == (end != "postcopy") && here.bytes() == there.bytes());
    }
    println!("migrated");
}

/// A guest that stands still goes into a `mapped:` file and comes out of it. The sessions run on this thread, which no filter
/// holds; the threads that write and read pages are held by theirs.
fn through_a_file(filters: Option<HashMap<String, BpfProgram>>) {
    let (here, there) = (Machine::new(), Machine::new());
    (0..PAGES).filter(|page| page % 5 > 0).for_each(|page| here.write(page, page + 1));
    let spawner = spawner(filters);
    let stop = Stop::on(&CancelToken::default());
    let folder = tempfile::tempdir().unwrap();
    let address: Address = format!("mapped:{}", folder.path().join("guest").display()).parse().unwrap();
    let mut options = ConnectionOptions::default();
    options.channels.count = 2;
    options.channels.spawn = spawner.callback();
    let mut settings = SourceSettings::new(Configuration::default());
    settings.guest_stands_still = true;
    settings.spawner = spawner.clone();
    let guest = SourceGuest {
        memory: here.memory.clone(),
        dirty: Vec::new(),
        control: Box::new(TestMachine::default()),
    };
    let link = open_source(&address, here.memory.clone(), &options, &stop).unwrap();
    let left = SourceSession::new(guest, link, settings).run();
    assert_eq!(left.outcome, Outcome::Completed, "{:?}", left.error);
    let mut arrives = DestinationSettings::default();
    arrives.spawner = spawner;
    let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
    let connection = listener.accept_connection(&options, &stop).unwrap();
    let guest = DestinationGuest {
        memory: Box::new(there.memory.clone()),
        control: Box::new(TestMachine::default()),
    };
    let arrived = DestinationSession::new(guest, connection, arrives).run();
    assert_eq!(arrived.ending, Ending::Running, "{:?}", arrived.error);
    assert!(here.bytes() == there.bytes());
    println!("migrated");
}

/// Starts a guest from a file before its memory is read, twice: with a working set that is not there yet, and with one.
fn restore(filters: Option<HashMap<String, BpfProgram>>) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let (path, set) = (folder.path().join("guest"), folder.path().join("working-set"));
    let address: Address = format!("mapped:{}", path.display()).parse().unwrap();
    let from = Machine::new();
    (0..PAGES).filter(|page| page % 5 > 0).for_each(|page| from.write(page, page));
    let connection =
        open_source(&address, from.memory.clone(), &ConnectionOptions::default(), &Stop::never()).unwrap();
    let control = Box::new(TestMachine::default());
    let guest = SourceGuest { memory: from.memory.clone(), dirty: Vec::new(), control };
    let mut settings = SourceSettings::new(Configuration::default());
    settings.guest_stands_still = true;
    assert_eq!(SourceSession::new(guest, connection, settings).run().outcome, Outcome::Completed);
    let spawner = spawner(filters);
    for _ in 0..2 {
        let mut settings = RestoreSettings::default();
        settings.way = RestoreWay::Lazy;
        (settings.user_mode_only, settings.working_set) = (true, Some(set.clone()));
        settings.destination.spawner = spawner.clone();
        let to = Machine::new();
        let control = Box::new(TestMachine::default());
        let guest = DestinationGuest { memory: Box::new(to.memory.clone()), control };
        let restored = RestoreSession::open(guest, &address, settings).unwrap().run().unwrap();
        assert_eq!(restored.report.ending, Ending::Running, "{:?}", restored.report.error);
        assert!(from.bytes() == to.bytes());
        restored.pages.unwrap().wait().unwrap();
    }
    println!("migrated");
}

/// Gives the one connection for urgent pages, then none until the migration's end.
fn one_more(connection: UnixStream) -> Box<dyn NextConnection> {
    let mut there = Some(connection);
    Box::new(move |stop: &Stop| match there.take() {
        Some(socket) => Ok(StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()),
        None => {
            while stop.sleep(Duration::from_millis(1)).is_none() {}
            let (peer, doing) = ("peer".into(), "waiting for a connection");
            Err(OpenError::from(ChannelError::Closed { peer, doing }))
        }
    })
}

/// A switch to postcopy by a source with a connection for urgent pages: here a stream made by hand. The last pages are
/// discarded, and come on that connection.
fn urgent(filters: Option<HashMap<String, BpfProgram>>) {
    const MISSING: u64 = 3;
    let there = Machine::new();
    let spawner = spawner(filters);
    let ((mut near, far), (mut urgent, theirs)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let mut settings = DestinationSettings::default();
    settings.spawner = spawner;
    settings.postcopy = true;
    let far = StreamChannel::from_fd(far.into(), "peer", &StreamOptions::default()).unwrap();
    let guest = DestinationGuest { memory: Box::new(there.memory.clone()), control: Box::new(there.clone()) };
    let session = DestinationSession::new(guest, DestinationConnection::over(far), settings)
        .with_next_connection(one_more(theirs));
    let arriving = session.spawn().unwrap();

    let mut main = Vec::new();
    file::encode_header(&mut main);
    file::encode_configuration(&Configuration::default(), &mut main);
    Command::OpenReturnPath.encode(&mut main);
    Command::PostcopyAdvise { host_pages: 4096, target_page: 4096 }.encode(&mut main);
    let name = BlockName::new("ram").unwrap();
    let host_page = Some(PageSize::SIZE_4K);
    let block = BlockAnnouncement { name, used_length: PAGES * 4096, host_page, guest_addr: None };
    encode_start(&SectionName { id: 2, idstr: ram::IDSTR, instance: 0, version: ram::VERSION }, &mut main);
    encode_block_list(&[block], &mut main);
    let end_section = |out: &mut Vec<u8>| {
        out.extend_from_slice(&ram::EOS_RECORD);
        encode_footer(2, out);
    };
    end_section(&mut main);
    let first = PAGES - MISSING;
    encode_discards("ram", &[(first * 4096, MISSING * 4096)], &mut main);
    let mut package = Vec::new();
    encode_package(b"devices", false, &mut package);
    Command::Packaged { size: package.len() as u32 }.encode(&mut main);
    main.extend_from_slice(&package);
    encode_end(2, &mut main);
    end_section(&mut main);
    encode_eof(&mut main);
    near.write_all(&main).unwrap();
    for page in first..PAGES {
        let mut record = Vec::new();
        ram::Record::Page(ram::PageAt { block: Some("ram"), offset: BlockOffset(page * 4096) })
            .encode(&mut record);
        record.extend_from_slice(&[9; 4096]);
        urgent.write_all(&record).unwrap();
    }
    // It stays open until the destination has reported its end.
    let (mut answers, mut shut, mut byte) = (Vec::new(), Vec::new(), [0]);
    Message::Shut { status: 0 }.encode(&mut shut);
    while !answers.ends_with(&shut) {
        near.read_exact(&mut byte).unwrap();
        answers.extend_from_slice(&byte);
    }
    drop(urgent);
    let arrived = arriving.wait().unwrap();
    assert_eq!(arrived.ending, Ending::Running, "{:?}", arrived.error);
    assert_eq!(arrived.missing_pages.unwrap().preempt_pages, MISSING);
    assert!(there.bytes().ends_with(&[9; MISSING as usize * 4096]));
    println!("migrated");
}

#[test]
#[ignore = "a process of the other tests"]
fn child() {
    let scenario = std::env::var(SCENARIO).unwrap_or_else(|_| "unix completed software none".into());
    let words: Vec<&str> = scenario.split(' ').collect();
    let mut filters = listed();
    if let Some((thread, call)) = words[3].split_once('/') {
        let rules = rules(&mut filters, thread);
        let before = rules.len();
        // A call, or one of the kinds of ioctl.
        rules.retain(|rule| rule["syscall"] != call && rule["comment"] != call);
        assert!(rules.len() < before, "{} is not listed", words[3]);
    }
    let filters = serde_json::to_vec(&filters).unwrap();
    let filters = (words[3] != "none").then(|| compile_from_json(&*filters, TargetArch::x86_64).unwrap());
    match words[0] {
        "file" if words[1] == "lazy" => restore(filters),
        "file" => through_a_file(filters),
        "urgent" => urgent(filters),
        way => migrate(way, words[1], words[2], filters),
    }
}

fn run(scenario: &str) -> Output {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture"]).env(SCENARIO, scenario);
    command.output().unwrap()
}

fn must_migrate(scenario: &str) {
    let output = run(scenario);
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let sigsys = if output.status.signal() == Some(libc::SIGSYS) {
        "a call is missing in docs/seccomp.json; strace -f this program's `child` to see which"
    } else {
        ""
    };
    assert!(output.status.success(), "{scenario}: {}: {sigsys}\n{}{}", output.status, said[0], said[1]);
    assert!(said[0].contains("migrated"), "{scenario}: the child ran nothing: {}", said[0]);
}

#[test]
fn a_migration_over_a_unix_socket_needs_no_other_call() {
    must_migrate("unix completed software all");
}

#[test]
fn a_migration_over_tcp_needs_no_other_call() {
    must_migrate("tcp completed software all");
}

#[test]
fn a_migration_that_asks_the_kernel_for_written_pages_needs_no_other_call() {
    must_migrate("unix completed kernel all");
}

#[test]
fn page_channels_need_no_other_call() {
    // They rest most of the time: at once, each in its process.
    std::thread::scope(|scope| {
        for scenario in [
            "channels completed software all",
            "spliced completed software all",
            "spliced cancelled software all",
            "lent completed software all",
            "channels cancelled software all",
        ] {
            scope.spawn(move || must_migrate(scenario));
        }
    });
}

/// Two nodes: the threads of page channels go to theirs.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_threads_that_go_to_their_node_need_no_other_call() {
    must_migrate("channels completed software all");
    let without = "ramwire-chan-rx/sched_setaffinity";
    let output = run(&format!("channels completed software {without}"));
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
}

#[test]
fn a_cancel_needs_no_other_call() {
    must_migrate("tcp cancelled kernel all");
}

#[test]
fn a_broken_connection_needs_no_other_call() {
    must_migrate("unix broken kernel all");
}

#[test]
fn a_switch_to_postcopy_needs_no_other_call() {
    must_migrate("unix postcopy software all");
    must_migrate("tcp postcopy software all");
}

#[test]
fn a_connection_for_urgent_pages_needs_no_other_call() {
    must_migrate("urgent completed none all");
    let without = "ramwire-preempt/readv";
    let output = run(&format!("urgent completed none {without}"));
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
}

#[test]
fn threads_that_write_and_read_a_file_need_no_other_call() {
    must_migrate("file completed none all");
    for without in ["ramwire-file-tx/pwritev", "ramwire-file-rx/pread64"] {
        let output = run(&format!("file completed none {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}

#[test]
fn a_lazy_restore_needs_no_other_call() {
    must_migrate("file lazy none all");
    for without in ["ramwire-file-rx/UFFDIO_COPY", "ramwire-restore/UFFDIO_UNREGISTER"] {
        let output = run(&format!("file lazy none {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}

#[test]
fn a_thread_that_lacks_one_of_its_calls_ends_the_process() {
    for without in [
        "ramwire-source/sendmsg",
        "ramwire-dest/readv",
        "ramwire-digest/exit",
        "ramwire-working/sendmsg",
        "ramwire-log/write",
    ] {
        let output = run(&format!("unix completed software {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
    for without in ["ramwire-faults/sendmsg", "ramwire-dest/UFFDIO_COPY", "ramwire-load/futex"] {
        let output = run(&format!("unix postcopy software {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}
