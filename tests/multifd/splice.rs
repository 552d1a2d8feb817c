//! `--send-pages splice`: pages sent by reference, with QEMUs, and when the connection or the kernel refuses.

use std::net::{TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

use ramwire::guest::MappedGuest;
use ramwire::ram::{BlockName, PageBatch, PageRun, RamBlock, Verdict};
use ramwire::stream::qemu::style::PeerStyle;
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{ChannelOptions, ConnectionOptions, PageSending, open_source};
use ramwire::units::{BlockIndex, PageIndex, PageSize};
use rustix::pipe::{SpliceFlags, pipe, splice};

use crate::common::{
    qemu::{Version, peers_present},
    scratch,
};
use crate::zero_copy::send_by;

/// How the child receives its task.
const SCENARIO: &str = "RAMWIRE_SIGPIPE_SCENARIO";

#[test]
fn a_qemu_gets_the_same_memory_and_every_page_went_by_reference() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        let dir = scratch();
        let report = send_by("splice", dir.path(), version, &["env"]);
        let found = &report["splice"];
        assert!(found["bytes"].as_u64() > Some(0), "{found}");
        assert_eq!((found["copied"].as_u64(), found["off"].is_null()), (Some(0), true), "{found}");
    }
}

fn gone() -> TcpStream {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    drop(listener.accept().unwrap());
    near
}

/// Sends pages to a peer that closes, until the link fails.
fn by_the_library() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", listener.local_addr().unwrap()).parse().unwrap();
    let pages = 2048;
    let mapping = Mapping::memfd("sigpipe", pages * 4096).unwrap();
    mapping.region().span(0, pages * 4096).unwrap().copy_from(&vec![7; pages as usize * 4096]);
    let block = RamBlock::new(BlockName::new("ram").unwrap(), pages * 4096);
    let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap();
    let mut channels = ChannelOptions::default();
    channels.count = 1;
    channels.sending = PageSending::Splice;
    let mut options = ConnectionOptions::default();
    options.channels = channels;
    let stop = Stop::on(&CancelToken::default()).within(Duration::from_secs(30));
    let mut link = open_source(&address, Arc::new(guest), &options, &stop).unwrap().link;
    let _main = listener.accept().unwrap();
    let (channel, _) = listener.accept().unwrap();
    link.set_peer_style(Some(PeerStyle::QEMU_7_2)).unwrap();
    // Closed with nothing unread: the peer answers the first bytes by a reset, and later sends get a broken pipe.
    drop(channel);
    let mut back = Vec::new();
    let error = loop {
        let mut batch = PageBatch::default();
        batch.push(PageRun { block: BlockIndex(0), first: PageIndex(0), pages: 512 }, Verdict::Whole);
        if let Err(error) = link.offer(batch, &stop).and_then(|_| link.collect(&mut back)) {
            break error;
        }
    };
    println!("alive: {error}");
}

#[test]
#[ignore = "a process of the other tests"]
#[allow(unsafe_code)]
fn sigpipe_child() {
    // SAFETY: the default of a process that was not started by Rust; no handler is involved.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    if std::env::var(SCENARIO).is_ok_and(|scenario| scenario == "library") {
        for _ in 0..20 {
            by_the_library();
        }
        return;
    }
    let near = gone();
    let (reader, writer) = pipe().unwrap();
    loop {
        rustix::io::write(&writer, &[0; 4096]).unwrap();
        match splice(&reader, None, &near, None, 4096, SpliceFlags::empty()) {
            Err(rustix::io::Errno::PIPE) => break,
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn child(scenario: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "splice::sigpipe_child", "--ignored", "--nocapture"]).env(SCENARIO, scenario);
    command.output().unwrap()
}

/// `splice(2)` knows no MSG_NOSIGNAL.
#[test]
fn a_broken_connection_does_not_kill_a_process_that_has_the_default_for_sigpipe() {
    assert_eq!(child("bare").status.signal(), Some(libc::SIGPIPE), "a bare splice does kill it");
    let output = child("library");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{:?} {said} {output:?}", output.status);
    assert_eq!(said.matches("alive").count(), 20, "{said}");
}
