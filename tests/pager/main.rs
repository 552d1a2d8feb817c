//! `ramwire pager` serves the memory of processes that hand it over like Firecracker does: this program again, with one
//! ignored test that is the VMM's side and checks each page that it receives.
#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod stand_in;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;

use common::Deadline;
#[cfg(feature = "tls")]
use common::certificates::Authority;
use common::huge_pages::HugePages;
use common::ramwire::Ramwire;
use ramwire::guest::{MappedGuest, TestMachine};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    Configuration, DestinationGuest, Ending, Outcome, RestoreSession, RestoreSettings, RestoreWay,
    SourceGuest, SourceSession, SourceSettings,
};
use ramwire::sys::{HostRegion, Mapping, Stop, discard};
use ramwire::transport::{Address, ConnectionOptions, open_source};
use ramwire::units::PageSize;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use stand_in::*;
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};

struct Pager {
    ramwire: Ramwire,
    socket: PathBuf,
}

impl Pager {
    fn start(folder: &Path, more: &[&str], from: &str) -> Self {
        let socket = folder.join("pager.sock");
        let listen = format!("unix:{}", socket.display());
        let arguments = [&["pager", "--listen", &listen], more, &["--from"]].concat();
        let mut ramwire = Ramwire::start(folder, &arguments, from);
        assert_eq!(ramwire.listening(), listen);
        Self { ramwire, socket }
    }

    fn orders(&self, does: &str) -> Value {
        json!({"socket": self.socket, "does": does, "huge": false, "pages": PAGES})
    }

    /// Waits until it has printed something.
    fn has_said(&self, what: &str) -> String {
        let errors = || self.ramwire.errors();
        Deadline::seconds(120).poll(what, errors, || Some(errors()).filter(|said| said.contains(what)))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.ramwire.pid() as i32).unwrap(), signal).unwrap();
    }
}

#[test]
fn a_guest_gets_its_pages_while_threads_touch_and_its_balloon_gives_back() {
    let folder = common::scratch();
    let path = memory_file(folder.path(), PAGES);
    let mut pager = Pager::start(folder.path(), &[], path.to_str().unwrap());
    let guest = StandIn::start(&pager.orders("touch"), None);
    guest.says("handed over");
    guest.says("touched");
    guest.says("whole");
    let name = guest.name();
    guest.ends_well();
    let said = pager.has_said(&format!("{name} has ended: "));
    assert!(said.contains("of memory are served"), "{said}");
    pager.signal(Signal::TERM);
    let (status, said) = pager.ramwire.ended(Deadline::seconds(60));
    assert_eq!(status, 0, "{said}");
    assert!(!pager.socket.exists());
}

/// One of several is killed in the middle; then the server, and another replaces it.
#[test]
fn several_guests_are_served_at_once_and_one_that_is_killed_harms_no_other() {
    let folder = common::scratch();
    let path = memory_file(folder.path(), PAGES);
    let pager = Pager::start(folder.path(), &["--max-vmms", "4"], path.to_str().unwrap());
    let mut guests: Vec<_> = (0..4).map(|_| StandIn::start(&pager.orders("half"), None)).collect();
    guests.iter().for_each(|guest| guest.says("handed over"));
    let served = || pager.ramwire.errors().matches("of memory are served").count();
    Deadline::seconds(120).poll(
        "all are served",
        || pager.ramwire.errors(),
        || (served() == 4).then_some(()),
    );
    guests.iter().for_each(|guest| guest.says("touched"));
    let one_more = StandIn::start(&pager.orders("connect"), None);
    one_more.says("connected");
    pager.has_said(&format!("{} was refused: 4 VMMs are served", one_more.name()));
    one_more.ends_well();
    let killed = guests.remove(0);
    let name = killed.name();
    drop(killed);
    pager.has_said(&format!("{name} has ended"));
    for mut guest in guests {
        guest.tell();
        guest.says("whole");
        guest.ends_well();
    }
    // The next server replaces the socket of a killed one.
    pager.signal(Signal::KILL);
    drop(pager);
    let pager = Pager::start(folder.path(), &[], path.to_str().unwrap());
    let guest = StandIn::start(&pager.orders("last"), None);
    guest.says("handed over");
    guest.says("read");
    guest.ends_well();
}

/// A figure of `--metrics`.
fn figure(address: &str, name: &str) -> f64 {
    let mut client = std::net::TcpStream::connect(address).unwrap();
    client.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut client, &mut text).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{name} is not in\n{text}")).parse::<f64>().unwrap()
}

/// As many as are served unless more are asked for; one is killed in the middle. The figures tell of all.
#[test]
fn sixty_four_guests_are_served_at_once_and_their_figures_are_told() {
    const GUESTS: usize = 64;
    const FEW: u64 = 200;
    let folder = common::scratch();
    let path = memory_file(folder.path(), FEW);
    let pager = Pager::start(folder.path(), &["--metrics", "0"], path.to_str().unwrap());
    let said = pager.has_said("metrics at http://");
    let address = said.split("metrics at http://").nth(1).and_then(|rest| rest.split('/').next()).unwrap();
    let figure = |name: &str| figure(address, name);
    let mut orders = pager.orders("half");
    orders["pages"] = json!(FEW);
    let mut guests: Vec<_> = (0..GUESTS).map(|_| StandIn::start(&orders, None)).collect();
    guests.iter().for_each(|guest| guest.says("handed over"));
    guests.iter().for_each(|guest| guest.says("touched"));
    let is = |name: &str, number: f64| {
        let what = format!("{name} is {number}");
        Deadline::seconds(120).poll(
            &what,
            || figure(name).to_string(),
            || (figure(name) == number).then_some(()),
        );
    };
    is("ramwire_pager_vmms", GUESTS as f64);
    let killed = guests.remove(GUESTS / 2);
    let name = killed.name();
    drop(killed);
    pager.has_said(&format!("{name} has ended"));
    is("ramwire_pager_vmms", GUESTS as f64 - 1.0);
    guests.iter_mut().for_each(StandIn::tell);
    for guest in guests {
        guest.says("whole");
        guest.ends_well();
    }
    is("ramwire_pager_vmms", 0.0);
    is("ramwire_pager_missing_pages", 0.0);
    assert_eq!(figure("ramwire_pager_connections_total{how=\"served\"}"), GUESTS as f64);
    assert_eq!(figure("ramwire_pager_connections_total{how=\"refused\"}"), 0.0);
    assert!(figure("ramwire_pager_faults_total") >= GUESTS as f64);
}

#[test]
fn memory_that_lies_on_another_host_comes_from_its_server() {
    comes_from_its_server(&[]);
}

/// And a pager without a certificate is refused by name, while the server goes on.
#[test]
#[cfg(feature = "tls")]
fn memory_that_lies_on_another_host_comes_encrypted() {
    let dir = common::scratch();
    let folder = Authority::new("the authority").folder(dir.path().join("certificates"));
    comes_from_its_server(&["--tls-dir", folder.to_str().unwrap(), "--require-tls"]);
    let path = memory_file(dir.path(), PAGES);
    let tls = format!("--tls-dir={}", folder.display());
    let arguments = ["serve", "--listen", "tcp:127.0.0.1:0", &tls, "--from"];
    let mut server = Ramwire::start(dir.path(), &arguments, path.to_str().unwrap());
    let address = server.listening();
    for kind in ["cert", "key"] {
        fs::remove_file(folder.join(format!("client-{kind}.pem"))).unwrap();
    }
    let listen = format!("--listen=unix:{}", dir.path().join("pager.sock").display());
    let refused = Ramwire::start(dir.path(), &["pager", &listen, &tls, "--from"], &address)
        .failed(Deadline::seconds(60), 3);
    assert!(refused.contains("asks for a certificate; put client-cert.pem"), "{refused}");
    let errors = || server.errors();
    Deadline::seconds(60)
        .poll("the server's word", errors, || server.errors().contains("shows no certificate").then_some(()));
    let plain =
        Ramwire::start(dir.path(), &["pager", &listen, "--from"], &address).failed(Deadline::seconds(60), 3);
    assert!(plain.contains(&address), "{plain}");
}

fn comes_from_its_server(tls: &[&str]) {
    let folder = common::scratch();
    let path = memory_file(folder.path(), PAGES);
    let there = folder.path().join("there");
    fs::create_dir(&there).unwrap();
    let listen = ["serve", "--metrics", "0", "--listen", "tcp:127.0.0.1:0"];
    let arguments = [&listen[..], tls, &["--from"]].concat();
    let mut server = Ramwire::start(&there, &arguments, path.to_str().unwrap());
    let address = server.listening();
    let said = Deadline::seconds(60).poll(
        "metrics",
        || server.errors(),
        || {
            let said = server.errors();
            said.contains("/metrics").then_some(said)
        },
    );
    let metrics = said.split("metrics at http://").nth(1).and_then(|rest| rest.split('/').next()).unwrap();
    let pager = Pager::start(folder.path(), tls, &address);
    let guests = [(); 3].map(|()| StandIn::start(&pager.orders("touch"), None));
    for guest in guests {
        guest.says("handed over");
        guest.says("touched");
        guest.says("whole");
        guest.ends_well();
    }
    assert!(server.errors().contains("has connected"), "{}", server.errors());
    // One connection for all its VMMs.
    for (name, number) in [
        ("ramwire_serve_clients", 1.0),
        ("ramwire_serve_connections_total{how=\"served\"}", 1.0),
        ("ramwire_serve_connections_total{how=\"refused\"}", 0.0),
        ("ramwire_serve_failed_reads_total", 0.0),
    ] {
        assert_eq!(figure(metrics, name), number, "{name}");
    }
    let (reads, bytes) =
        (figure(metrics, "ramwire_serve_reads_total"), figure(metrics, "ramwire_serve_read_bytes_total"));
    assert!(reads > 0.0 && bytes >= reads * 4096.0, "{reads} reads, {bytes} bytes");
    assert!(!server.errors().contains("unencrypted"), "{}", server.errors());
    kill_process(Pid::from_raw(server.pid() as i32).unwrap(), Signal::TERM).unwrap();
    let (status, said) = server.ended(Deadline::seconds(60));
    assert_eq!(status, 0, "{said}");
}

/// A page that can't be read is reported by name, and its thread waits; when it can be read, its guest continues.
#[test]
fn a_page_that_can_not_be_read_is_named_and_tried_again() {
    let folder = common::scratch();
    let path = memory_file(folder.path(), PAGES);
    let file = File::options().write(true).open(&path).unwrap();
    let pager = Pager::start(folder.path(), &[], path.to_str().unwrap());
    // The old content is gone, and none of it has been read.
    file.set_len((PAGES - 1) * 4096).unwrap();
    let guest = StandIn::start(&pager.orders("last"), None);
    guest.says("handed over");
    // The last page of the first region that was handed over: the upper half.
    let place = format!("the page at {:#x} of RAM block number 0 could not be had", (PAGES / 2 - 1) * 4096);
    let said = pager.has_said("it is tried again every");
    assert!(said.contains(&place) && said.contains(path.to_str().unwrap()), "{said}");
    assert!(guest.lines.try_recv().is_err(), "it reads what is not there");
    write_page(&file, PAGES - 1);
    guest.says("read");
    guest.ends_well();
    let said = pager.has_said(" has ended: ");
    assert!(said.contains("ended: 1 faults, 1 pages read for them, 0 were still missing"), "{said}");
}

#[test]
fn what_is_handed_over_wrong_is_refused_by_what_is_wrong() {
    let folder = common::scratch();
    let path = memory_file(folder.path(), PAGES);
    let pager = Pager::start(folder.path(), &["--allow-uid", "1"], path.to_str().unwrap());
    let mapping = Mapping::anonymous(8 * 4096).unwrap();
    let region = mapping.region();
    let faults = uffd(&[region]);
    let plain = UffdBuilder::new().non_blocking(true).user_mode_only(true).create().unwrap();
    let (pipe, _end) = std::io::pipe().unwrap();
    let good = json!([element(region, 0, 4096)]).to_string();
    let [faults, plain, pipe] = [faults.as_fd(), plain.as_fd(), pipe.as_fd()];
    let without = good.replace("\"page_size\"", "\"page\"");
    let long = format!("[{}", " ".repeat(3 << 20));
    for (message, descriptors, why) in [
        ("[]", &[faults][..], "0 regions"),
        (&good, &[], "0 descriptors"),
        (&good, &[faults, faults], "2 descriptors"),
        (&good, &[pipe], "no userfaultfd but pipe:"),
        (&good, &[plain], "UFFD_FEATURE_EVENT_REMOVE"),
        (&without, &[faults], "missing field `page_size`"),
        ("nonsense", &[faults], "is no array of memory regions: expected ident"),
        (&json!([element(region, 0, 8192)]).to_string(), &[faults], "page size is 0x2000"),
        (&json!([element(region, PAGES * 4096, 4096)]).to_string(), &[faults], "offset is 0xbb8000"),
        (&good[..20], &[faults], "hung up after 20 bytes"),
        (&long, &[faults], "longer than 1048576 bytes"),
    ] {
        let socket = UnixStream::connect(&pager.socket).unwrap();
        if message.len() > 1 << 20 {
            // It closes the connection before all bytes are written.
            let _ = (&socket).write_all(message.as_bytes());
        } else {
            hand_over(&socket, message, descriptors);
        }
        drop(socket);
        pager.has_said(why);
    }
    // Another user: its bytes are not even read.
    if rustix::process::geteuid().is_root() {
        let opened = fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755));
        opened.unwrap();
        let guest = StandIn::start(&pager.orders("connect"), Some(65534));
        guest.says("connected");
        pager.has_said("of user 65534 was refused; --allow-uid 65534 lets it in");
        guest.ends_well();
    }
}

/// Pages of 2 MiB, as in Firecracker's snapshots with huge pages, which can be restored in no other way.
#[test]
fn huge_pages_are_served_whole() {
    const HUGE: u64 = 8;
    let Some(_reserved) = HugePages::reserve(2048, HUGE) else { return };
    let folder = common::scratch();
    let path = memory_file(folder.path(), HUGE * 512);
    let pager = Pager::start(folder.path(), &[], path.to_str().unwrap());
    let mut orders = pager.orders("touch");
    (orders["huge"], orders["pages"]) = (true.into(), (HUGE * 512).into());
    let guest = StandIn::start(&orders, None);
    for line in ["handed over", "touched", "whole"] {
        guest.says(line);
    }
    guest.ends_well();
}

/// A huge page that is partly in the file is placed whole, one that is not in it is zero.
#[test]
fn a_guest_in_huge_pages_is_restored_while_it_runs() {
    const HUGE: u64 = 4;
    let Some(_reserved) = HugePages::reserve(2048, HUGE) else { return };
    let folder = common::scratch();
    let address: Address = format!("mapped:{}", folder.path().join("guest").display()).parse().unwrap();
    let guest = |mapping: &Mapping| {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), HUGE << 21);
        Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping).build().unwrap())
    };
    let held = |page: u64| [5, 2047].contains(&page) || (1024..1536).contains(&page);
    let small = Mapping::anonymous(HUGE << 21).unwrap();
    for page in (0..HUGE * 512).filter(|page| held(*page)) {
        small.region().span(page * 4096, 8).unwrap().copy_from(&page.to_le_bytes());
    }
    let (memory, stop) = (guest(&small), Stop::never());
    let connection = open_source(&address, memory.clone(), &ConnectionOptions::default(), &stop).unwrap();
    let control = Box::new(TestMachine::running(b""));
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    let saved = SourceGuest { memory, dirty: Vec::new(), control };
    assert_eq!(SourceSession::new(saved, connection, settings).run().outcome, Outcome::Completed);

    let huge = Mapping::anonymous_huge(HUGE << 21, PageSize::SIZE_2M).unwrap();
    let mut settings = RestoreSettings::default();
    (settings.way, settings.user_mode_only) = (RestoreWay::Lazy, true);
    let arriving =
        DestinationGuest { memory: Box::new(guest(&huge)), control: Box::new(TestMachine::default()) };
    let restored = RestoreSession::open(arriving, &address, settings).unwrap().run().unwrap();
    assert_eq!(restored.report.ending, Ending::Running, "{:?}", restored.report.error);
    for step in 0..HUGE * 512 {
        let page = step * 7 % (HUGE * 512);
        assert_eq!(number(huge.region(), page), if held(page) { page } else { 0 });
    }
    restored.pages.unwrap().wait().unwrap();
    assert!((0..HUGE * 512).all(|page| number(huge.region(), page) == if held(page) { page } else { 0 }));
}
