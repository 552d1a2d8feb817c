//! Ends with different numbers of page channels, and pages that are lost in transit: never a success, and both ends
//! report the reason. The listener stays open throughout, like a VMM's.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use ramwire::engine::{Ending, Outcome, Reason};
use ramwire::guest::{GuestMemory, MappedGuest, TestMachine};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    DestinationGuest, DestinationReport, DestinationSession, DestinationSettings, Error, Incoming,
    MemoryProvider, SourceGuest, SourceReport, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{
    Address, AllowList, ChannelOptions, ConnectionOptions, Listener, StreamOptions, open_source,
};
use ramwire::units::PageSize;
use serde_json::json;

use crate::common::{
    Deadline,
    memory::{Pattern, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    scratch,
};

/// 4 MiB, a batch for each of two channels: it fits into the buffers of a socket that is not read.
pub(crate) const PAGES: u64 = 1024;

pub(crate) fn guest(mapping: &Mapping) -> Arc<MappedGuest> {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping).build().unwrap())
}

/// No page is zero, and no two are equal.
pub(crate) fn filled() -> Mapping {
    let from = Mapping::anonymous(PAGES * 4096).unwrap();
    let bytes: Vec<u8> = (0..PAGES * 512).flat_map(|word| (word + 1).to_le_bytes()).collect();
    from.region().span(0, PAGES * 4096).unwrap().copy_from(&bytes);
    from
}

fn bytes(mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * 4096) as usize];
    mapping.region().span(0, PAGES * 4096).unwrap().copy_to(&mut bytes);
    bytes
}

pub(crate) fn options(channels: u8) -> ConnectionOptions {
    let channels = {
        let mut options = ChannelOptions::default();
        options.count = channels;
        options.active = Some(255);
        options
    };
    // How long a destination waits for connections that are not made.
    let mut stream = StreamOptions::default();
    stream.dead_peer = Duration::from_secs(60);
    let mut options = ConnectionOptions::default();
    options.stream = stream;
    options.channels = channels;
    options
}

pub(crate) fn stop() -> Stop {
    Stop::on(&CancelToken::default()).within(Duration::from_secs(120))
}

pub(crate) fn bind() -> Listener {
    Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), AllowList::default(), &stop()).unwrap()
}

/// The results of both ends: the destination may have failed before there was a session.
struct Ended {
    source: SourceReport,
    destination: Result<DestinationReport, String>,
    same: bool,
}

impl Ended {
    fn source_error(&self) -> String {
        self.source.error.as_ref().map(|error| ramwire::error::Chain(error).to_string()).unwrap_or_default()
    }

    fn destination_error(&self) -> String {
        match &self.destination {
            Ok(report) => report
                .error
                .as_ref()
                .map(|error| ramwire::error::Chain(error).to_string())
                .unwrap_or_default(),
            Err(error) => error.clone(),
        }
    }

    /// The guest continues at the source, and only there.
    fn assert_it_stayed(&self) {
        let (source, destination) = (self.source_error(), self.destination_error());
        let lost = !self.same;
        assert_eq!(
            self.source.outcome,
            Outcome::StaysHere(Reason::Failed),
            "{source}; {destination}; lost {lost}"
        );
        assert!(self.source.guest_is_safe_here(), "{source}");
        if let Ok(report) = &self.destination {
            assert_eq!(report.ending, Ending::Discarded, "{destination}");
        }
    }
}

/// Migrates by `sends` channels to `address` into a destination of `listener` that has `receives`.
fn migrate_to(
    listener: &mut Listener,
    address: &Address,
    (sends, receives): (u8, u8),
    set: impl FnOnce(&mut SourceSettings),
) -> Ended {
    let (from, to) = (filled(), Mapping::anonymous(PAGES * 4096).unwrap());
    let (near_machine, far_machine) = (TestMachine::running(b"devices"), TestMachine::default());
    let connection = open_source(address, guest(&from), &options(sends), &stop()).unwrap();
    let control = Box::new(near_machine.clone());
    let source = SourceGuest { memory: guest(&from), dirty: Vec::new(), control };
    let mut settings =
        SourceSettings::new(Configuration { machine: "none".into(), ..Configuration::default() });
    settings.guest_is_paused = true;
    set(&mut settings);
    let source = SourceSession::new(source, connection, settings);
    let source = std::thread::spawn(move || source.run());
    let destination = listener
        .accept_connection(&options(receives), &stop())
        .map_err(|error| ramwire::error::Chain(&error).to_string());
    let destination = destination.map(|connection| {
        let control = Box::new(far_machine.clone());
        let settings = DestinationSettings::default();
        DestinationSession::new(
            DestinationGuest { memory: Box::new(guest(&to)), control },
            connection,
            settings,
        )
        .run()
    });
    let ended = Ended { source: source.join().unwrap(), destination, same: bytes(&from) == bytes(&to) };
    assert!(!(near_machine.runs() && far_machine.runs()), "the guest runs twice");
    ended
}

fn migrate(sends: u8, receives: u8) -> Ended {
    let mut listener = bind();
    let address = listener.address().clone();
    migrate_to(&mut listener, &address, (sends, receives), |_| {})
}

fn assert_both_name(sends: u8, receives: u8, what: &str) {
    let ended = migrate(sends, receives);
    ended.assert_it_stayed();
    for said in [ended.source_error(), ended.destination_error()] {
        assert!(said.contains(what), "{sends} to {receives}: {said}");
    }
}

#[test]
fn a_source_with_more_channels_than_its_destination_is_refused_by_name() {
    assert_both_name(2, 1, "the source has 2 page channels and the destination 1;");
    assert_both_name(3, 2, "the source has 3 page channels and the destination 2;");
    assert_both_name(4, 1, "the source has 4 page channels and the destination 1;");
    assert_both_name(2, 0, "the source has 2 page channels and the destination 0;");
}

#[test]
fn a_source_with_fewer_channels_than_its_destination_is_refused_by_name() {
    assert_both_name(0, 2, "the source has 0 page channels and the destination 2;");
    assert_both_name(2, 3, "the source has 2 page channels and the destination 3;");
    assert_both_name(1, 4, "the source has 1 page channel and the destination 4;");
}

/// A silent connection takes no channel's place, and does not hide the difference.
#[test]
fn a_silent_connection_is_no_channel() {
    let mut listener = bind();
    let address = listener.address().clone();
    let (_, port) = address.host_and_port().unwrap();
    let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let ended = migrate_to(&mut listener, &address, (2, 3), |_| {});
    ended.assert_it_stayed();
    for said in [ended.source_error(), ended.destination_error()] {
        assert!(said.contains("the source has 2 page channels and the destination 3;"), "{said}");
    }
    let ended = migrate_to(&mut listener, &address, (2, 2), |_| {});
    let said = [ended.source_error(), ended.destination_error()];
    assert_eq!(ended.source.outcome, Outcome::Completed, "{said:?}");
    assert!(ended.same);
}

/// Creates the memory of any arriving guest.
#[derive(Default)]
struct Any(Vec<Mapping>);

impl MemoryProvider for Any {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        let mut guest = MappedGuest::builder(PageSize::SIZE_4K);
        for block in &incoming.blocks {
            let mapping = Mapping::anonymous(block.used_length).unwrap();
            guest = guest.mapping(block.clone(), &mapping);
            self.0.push(mapping);
        }
        Ok(Arc::new(guest.build()?))
    }
}

/// A QEMU does not announce its number of channels: the numbers of its packets show it, or the missing packets.
#[test]
fn a_qemu_with_more_channels_than_its_destination_is_refused() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        for (sends, receives) in [(4, 2), (2, 1), (3, 2), (2, 0)] {
            qemu_with_surplus_channels(version, sends, receives);
        }
    }
}

/// An error with all its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn qemu_with_surplus_channels(version: Version, sends: u8, receives: u8) {
    let what = format!("{version}: {sends} to {receives}");
    let dir = scratch();
    let ram = dir.path().join("ram");
    // Little is sent: it fits into the buffers of sockets that are not read.
    fill(&ram, 16, Pattern::Zero);
    let mut source = Guest::new(version, Machine::Q35, &ram, 16).running().start(dir.path(), "source");
    source.set_capabilities(&["return-path", "multifd"]);
    source.set_parameters(json!({"multifd-channels": sends}));
    // Open to the end, like a VMM's.
    let mut listener = bind();
    source.migrate(&listener.address().to_string());
    let connection =
        listener.accept_connection(&options(receives), &stop()).map_err(|error| error.to_string());
    let machine = TestMachine::default();
    let said = match connection {
        Ok(connection) => {
            let control = Box::new(machine.clone());
            let settings = DestinationSettings::default();
            let report = DestinationSession::new(
                DestinationGuest { memory: Box::new(Any::default()), control },
                connection,
                settings,
            )
            .run();
            assert_eq!(report.ending, Ending::Discarded, "{what}: {:?}", report.error);
            chain(&report.error.expect("it did not run"))
        }
        Err(said) => said,
    };
    println!("{what}: {said}");
    let named = [
        "more page channels than",
        "more than",
        "pages on channels of their own",
        "page channels (multifd) that are not read here",
        "exceeds the number of channels",
    ];
    // A channel that arrives while main is awaited is closed as a stranger's. The source then fails, or waits without
    // end.
    let ends = ["the source has failed", "no byte moved"];
    let closed = ends.iter().any(|end| said.contains(end));
    assert!(closed || named.iter().any(|named| said.contains(named)), "{what}: {said}");
    assert!(!machine.runs(), "{what}: the guest runs here");
    if version == Version::Qemu72 {
        return runs_or_died(&mut source, &what);
    }
    let info = source.wait_migration(Deadline::seconds(120));
    assert_eq!(info["status"], "failed", "{what}: {info}");
    source.wait_status("running", Deadline::seconds(30));
}

/// A QEMU 7.2 may crash when a channel is refused while its main connection ends. It may also miss the failure of a
/// channel that it waits for, and stay "active" until it is cancelled. Its guest always stays.
fn runs_or_died(source: &mut Qemu, what: &str) {
    let deadline = Deadline::seconds(120);
    while let Ok(info) = source.try_execute("query-status", json!({})) {
        if info["status"] == "running" {
            return;
        }
        assert!(!deadline.is_over(), "{what}: {info}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Bytes of a channel's first packet, and of the header of each further one.
const INIT: usize = 64;
const HEADER: usize = 320 + 128 * 8;

/// Forwards the bytes of one channel, without its first packet of pages.
fn lose_a_packet(mut from: TcpStream, mut to: TcpStream, mut loses: bool) -> io::Result<()> {
    let mut init = [0; INIT];
    from.read_exact(&mut init)?;
    to.write_all(&init)?;
    loop {
        let mut packet = vec![0; HEADER];
        from.read_exact(&mut packet)?;
        let pages = u32::from_be_bytes(packet[16..20].try_into().unwrap()) as usize;
        packet.resize(HEADER + pages * 4096, 0);
        from.read_exact(&mut packet[HEADER..])?;
        if !(pages > 0 && std::mem::take(&mut loses)) {
            to.write_all(&packet)?;
        }
    }
}

/// A proxy between a source and the destination at `to`; the first page channel with a packet of pages loses that
/// packet.
fn lossy_proxy(to: std::net::SocketAddr, channels: usize, loses: bool) -> Address {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let main = listener.accept().unwrap().0;
        let far = TcpStream::connect(to).unwrap();
        for (mut from, mut to) in
            [(main.try_clone().unwrap(), far.try_clone().unwrap()), (far.try_clone().unwrap(), main)]
        {
            std::thread::spawn(move || {
                let _ = io::copy(&mut from, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Write);
            });
        }
        for at in 0..channels {
            let (from, far) = (listener.accept().unwrap().0, TcpStream::connect(to).unwrap());
            std::thread::spawn(move || lose_a_packet(from, far, loses && at == 0));
        }
    });
    Address::tcp("127.0.0.1", port)
}

fn migrate_through_proxy(loses: bool) -> Ended {
    let mut listener = bind();
    let (_, port) = listener.address().host_and_port().unwrap();
    let proxy = lossy_proxy(([127, 0, 0, 1], port).into(), 2, loses);
    migrate_to(&mut listener, &proxy, (2, 2), |_| {})
}

/// Without a digest, and although every connection is read to its end.
#[test]
fn a_page_that_gets_lost_is_found_before_ready() {
    let ended = migrate_through_proxy(true);
    ended.assert_it_stayed();
    for said in [ended.source_error(), ended.destination_error()] {
        assert!(said.contains("page channel") && said.contains(" lost pages: the source sent "), "{said}");
    }
    let ended = migrate_through_proxy(false);
    assert_eq!(
        ended.source.outcome,
        Outcome::Completed,
        "{}; {}",
        ended.source_error(),
        ended.destination_error()
    );
    assert!(ended.same);
}
