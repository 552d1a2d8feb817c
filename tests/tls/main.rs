//! Encrypted streams: with QEMUs, and against peers that must not be accepted.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod postcopy;
mod relays;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use common::{
    Deadline,
    certificates::{Authority, Wanted},
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use serde_json::{Value, json};

const MIB: usize = 32;

fn ram_file(folder: &Path) -> PathBuf {
    let text = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    let blocks = manifest["blocks"].as_array().unwrap();
    let block = blocks.iter().find(|block| block["name"] == "m0").expect("the block is in the manifest");
    folder.join(block["file"].as_str().unwrap())
}

/// A QEMU that encrypts its migration with the certificates of a folder.
fn encrypting(guest: Guest, dir: &Path, certificates: &Path) -> Qemu {
    let (endpoint, name) = if guest.incoming { ("server", "destination") } else { ("client", "source") };
    let object = format!("tls-creds-x509,id=tls0,dir={},endpoint={endpoint}", certificates.display());
    let mut qemu = guest.with(["-object", &object]).start(dir, name);
    qemu.set_parameters(json!({"tls-creds": "tls0", "max-bandwidth": 0}));
    qemu
}

fn multifd(qemu: &mut Qemu, channels: u8) {
    if channels > 0 {
        qemu.set_capabilities(&["multifd"]);
        qemu.set_parameters(json!({"multifd-channels": channels}));
    }
}

/// QEMU -> folder -> QEMU, encrypted on both legs, the first with a return path.
fn there_and_back(version: Version, channels: u8, unix: bool) {
    let what = format!("{version}, {channels} channels, unix: {unix}");
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (sent, arrived, folder) = (path("sent"), path("arrived"), path("guest"));
    let certificates = Authority::new("the authority").folder(path("certificates"));
    let tls = format!("--tls-dir={}", certificates.display());
    fill(&sent, MIB, Pattern::Mixed { seed: 7 });
    fill(&arrived, MIB, Pattern::Zero);
    let count = format!("--channels={channels}");

    let near = if unix { format!("unix:{}", path("near").display()) } else { "tcp:127.0.0.1:0".into() };
    let mut receive = vec!["receive", &near, "--json", &tls, &count];
    // The common name in the source's certificate.
    receive.extend((!unix).then_some("--tls-authz=client"));
    receive.push("--dir");
    let mut receiver = Ramwire::start(dir.path(), &receive, &folder);
    let guest = Guest::new(version, Machine::Q35, &sent, MIB);
    let mut source = encrypting(guest, dir.path(), &certificates);
    source.set_capabilities(&["return-path"]);
    multifd(&mut source, channels);
    if unix {
        source.set_parameters(json!({"tls-hostname": "localhost"}));
    }
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    let report = receiver.finished(Deadline::seconds(30), 0);
    assert_eq!(report["arrived"], true, "{what}: {report}");
    compare(&sent, &ram_file(&folder)).unwrap_or_else(|d| panic!("{what}: in the folder: {d:?}"));
    source.kill();

    let guest = Guest::new(version, Machine::Q35, &arrived, MIB).incoming();
    let mut destination = encrypting(guest, dir.path(), &certificates);
    multifd(&mut destination, channels);
    let far = if unix { destination.listen_unix() } else { destination.listen_tcp() };
    let mut send = vec!["send", &far, "--json", &tls, &count];
    if unix {
        send.push("--tls-hostname=localhost");
    }
    send.push("--dir");
    let report = Ramwire::start(dir.path(), &send, &folder).finished(Deadline::seconds(60), 0);
    assert_eq!(report["status"], "completed", "{what}: {report}");
    destination.wait_completed(Deadline::seconds(10));
    compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: at the destination: {d:?}"));
}

#[test]
fn a_guest_goes_encrypted_from_every_qemu_and_to_it() {
    if peers_present() {
        for version in Version::ALL {
            there_and_back(version, 0, version == Version::Qemu100);
        }
    }
}

/// The certificate is valid in both attempts; the list has only the name of one, or the common name of all.
#[test]
fn only_a_client_that_is_listed_comes_in() {
    let ours = Authority::new("the authority");
    for (listed, refused) in [("guest-host", Some("names `client`, `localhost`")), ("client", None)] {
        let dir = scratch();
        let path = |name: &str| dir.path().join(name);
        let certificates = ours.folder(path("certificates"));
        let tls = format!("--tls-dir={}", certificates.display());
        fill(&path("ram"), 1, Pattern::Mixed { seed: 3 });
        let block = format!("m0={}", path("ram").display());
        let listed = format!("--tls-authz={listed}");
        let receive = ["receive", "tcp:127.0.0.1:0", "--json", &tls, "--tls-authz=nobody", &listed, "--dir"];
        let mut receiver = Ramwire::start(dir.path(), &receive, path("guest"));
        let uri = receiver.listening();
        let send = ["send", &uri, "--json", "--peer=ramwire", &tls, "--ram"];
        if let Some(named) = refused {
            let text = Ramwire::start(dir.path(), &send, &block).failed(Deadline::seconds(60), 3);
            assert!(text.contains("refused the TLS connection"), "{text}");
            let told = || receiver.errors();
            let heard = Deadline::seconds(60).poll("the destination's word", told, || {
                receiver.errors().contains("still listening").then(|| receiver.errors())
            });
            assert!(heard.contains(named) && heard.contains("only listed clients may come in"), "{heard}");
            ours.issue(&certificates, "client", Wanted { names: &["guest-host"], ..Wanted::GOOD });
        }
        let report = Ramwire::start(dir.path(), &send, &block).finished(Deadline::seconds(60), 0);
        assert_eq!(report["status"], "completed", "{listed}: {report}");
        assert_eq!(receiver.finished(Deadline::seconds(60), 0)["arrived"], true, "{listed}");
        compare(&path("ram"), &ram_file(&path("guest"))).unwrap_or_else(|d| panic!("{listed}: {d:?}"));
    }
}

#[test]
fn page_channels_are_encrypted_each_from_every_qemu_and_to_it() {
    if peers_present() {
        for version in Version::ALL {
            there_and_back(version, 2, version == Version::Newest);
        }
    }
}

/// On this machine's loopback there is no RDMA; `in_rxe_guest` tests have both.
#[test]
fn an_auto_address_is_encrypted_by_tcp_and_what_could_be_rdma_is_refused_where_pages_must_be_encrypted() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let certificates = Authority::new("the authority").folder(path("certificates"));
    let tls = format!("--tls-dir={}", certificates.display());
    fill(&path("ram"), 4, Pattern::Mixed { seed: 5 });
    let block = format!("m0={}", path("ram").display());
    let receive = ["receive", "auto:127.0.0.1:0", "--json", &tls, "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, path("guest"));
    let uri = receiver.listening();
    // Without TLS nobody comes in.
    let said = Ramwire::start(dir.path(), &["send", &uri, "--json", "--ram"], &block);
    let said = { said }.failed(Deadline::seconds(60), 3);
    assert!(said.contains("TLS alert, and nothing is encrypted here"), "{said}");
    let send = ["send", &uri, "--json", "--peer=ramwire", "--digest", &tls, "--ram"];
    let sent = Ramwire::start(dir.path(), &send, &block).finished(Deadline::seconds(60), 0);
    let received = receiver.finished(Deadline::seconds(60), 0);
    for report in [&sent, &received] {
        assert_eq!(report["transport"], "tcp", "{report}");
        assert!(report["why"].as_str().unwrap().contains("RDMA did not work"), "{report}");
    }
    compare(&path("ram"), &ram_file(&path("guest"))).unwrap_or_else(|d| panic!("{d:?}"));
    assert!(!receiver.errors().contains("unencrypted"), "{}", receiver.errors());

    let send = ["send", "auto:10.0.0.7:1", "--require-tls", &tls, "--ram"];
    let said = Ramwire::start(dir.path(), &send, &block).failed(Deadline::seconds(60), 2);
    assert!(said.contains("by RDMA the pages of guest RAM travel unencrypted even with TLS"), "{said}");
    let relay = ["relay", "--listen=tcp:0.0.0.0:0", "--require-tls", &tls, "--connect"];
    let said = Ramwire::start(dir.path(), &relay, "tcp:10.0.0.7:1").failed(Deadline::seconds(60), 2);
    assert!(said.contains("tcp:0.0.0.0:0") && said.contains("give --listen-tls-dir DIR"), "{said}");
}

/// A listening socket of a service manager's is as good as one that `receive` has made itself.
#[test]
fn a_listening_socket_that_is_handed_over_takes_channels_and_tls() {
    for (unix, encrypted, channels) in
        [(false, true, 2), (false, false, 2), (true, true, 0), (true, false, 2)]
    {
        let what = format!("unix: {unix}, TLS: {encrypted}, {channels} channels");
        let dir = scratch();
        let path = |name: &str| dir.path().join(name);
        let certificates = Authority::new("the authority").folder(path("certificates"));
        let (tls, count) =
            (format!("--tls-dir={}", certificates.display()), format!("--channels={channels}"));
        let more: &[&str] = if encrypted { &[&tls, &count] } else { &[&count] };
        fill(&path("ram"), MIB, Pattern::Mixed { seed: 11 });
        let (socket, here): (OwnedFd, _) = if unix {
            let near = path("near");
            (UnixListener::bind(&near).unwrap().into(), format!("unix:{}", near.display()))
        } else {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let here = format!("tcp:{}", listener.local_addr().unwrap());
            (listener.into(), here)
        };
        let receive = [&["receive", "fd:0", "--json"], more, &["--dir"]].concat();
        let mut receiver = Ramwire::start_on(dir.path(), &receive, path("guest"), socket.into());
        let uri = receiver.listening();
        assert_eq!(uri, here, "{what}");
        let block = format!("m0={}", path("ram").display());
        let send = ["send", &uri, "--json", "--peer=ramwire", "--tls-hostname=localhost"];
        let send = if encrypted { &send[..] } else { &send[..4] };
        let send = [send, more, &["--ram"]].concat();
        let report = Ramwire::start(dir.path(), &send, &block).finished(Deadline::seconds(60), 0);
        assert_eq!(report["status"], "completed", "{what}: {report}");
        let report = receiver.finished(Deadline::seconds(60), 0);
        assert_eq!(report["transport"], if unix { "unix" } else { "tcp" }, "{what}");
        compare(&path("ram"), &ram_file(&path("guest"))).unwrap_or_else(|d| panic!("{what}: {d:?}"));
        // It belongs to who has made it.
        assert!(!unix || path("near").exists(), "{what}");
    }
}

/// A descriptor that is one stream is not encrypted, and a socket that has no address is none to listen on.
#[test]
fn what_is_handed_over_and_can_not_be_listened_on_is_refused() {
    let dir = scratch();
    let certificates = Authority::new("the authority").folder(dir.path().join("certificates"));
    let tls = format!("--tls-dir={}", certificates.display());
    let (near, _far) = UnixStream::pair().unwrap();
    let receive = ["receive", "fd:0", &tls, "--dir"];
    let start =
        |input: OwnedFd| Ramwire::start_on(dir.path(), &receive, dir.path().join("guest"), input.into());
    let said = start(near.into()).failed(Deadline::seconds(60), 2);
    assert!(said.contains("fd:0 can't be encrypted"), "{said}");
    let name = SocketAddr::from_abstract_name(format!("ramwire-test-{}", std::process::id())).unwrap();
    let said = start(UnixListener::bind_addr(&name).unwrap().into()).failed(Deadline::seconds(60), 3);
    assert!(said.contains("it has no path") && said.contains("hand over a listening"), "{said}");
}

/// Content of the folder of one end.
#[derive(Clone, Copy, Debug)]
enum Has {
    Certificate(Wanted),
    /// Of another authority.
    Strange,
    /// Only the authority's.
    Nothing,
    /// No `--tls-dir`.
    Plain,
}

const EXPIRED: Wanted = Wanted { years: (2020, 2021), ..Wanted::GOOD };
const EARLY: Wanted = Wanted { years: (2199, 2200), ..Wanted::GOOD };
const REVOKED: Wanted = Wanted { serial: 66, ..Wanted::GOOD };

/// A certificate that the source or its destination must refuse: which end's, and the messages of both ends. The
/// destination then accepts a valid source, if its own certificate is valid.
#[test]
fn what_should_not_come_in_is_refused_by_name_and_listening_goes_on() {
    let (good, own) = (Has::Certificate(Wanted::GOOD), Wanted::GOOD);
    let elsewhere = Has::Certificate(Wanted { names: &["elsewhere.example"], ..own });
    let nameless = Has::Certificate(Wanted { names: &[], ..own });
    for (source, destination, there, here) in [
        (Has::Strange, good, "another authority", "does not know"),
        (Has::Certificate(EXPIRED), good, "certificate has expired; renew it", "not valid now"),
        (Has::Certificate(EARLY), good, "is not valid yet; set the clocks", "certificate"),
        (Has::Certificate(REVOKED), good, "was revoked", "was revoked"),
        (Has::Nothing, good, "shows no certificate", "asks for a certificate; put client-cert.pem"),
        (Has::Plain, good, "does not speak TLS", "TLS alert, and nothing is encrypted here; switch TLS on"),
        (good, Has::Plain, "it begins a TLS handshake", "in the TLS handshake; see whether it has TLS"),
        (good, Has::Strange, "does not know", "another authority"),
        (good, Has::Certificate(EXPIRED), "not valid now", "certificate has expired"),
        (good, Has::Certificate(EARLY), "not valid now", "is not valid yet"),
        (good, Has::Certificate(REVOKED), "was revoked", "was revoked"),
        (good, elsewhere, "certificate", "is for elsewhere.example, not for 127.0.0.1; "),
        (good, nameless, "certificate", "no subjectAltName; issue one with"),
    ] {
        let what = format!("{source:?} to {destination:?}");
        let dir = scratch();
        let (ours, strange) = (Authority::new("the authority"), Authority::new("a stranger"));
        let folder = |name: &str, end: &str, has: Has| {
            let folder = ours.folder(dir.path().join(name));
            ours.revoke(&folder, &[66]);
            match has {
                Has::Certificate(wanted) => ours.issue(&folder, end, wanted),
                Has::Strange => strange.issue(&folder, end, Wanted::GOOD),
                Has::Nothing => ["cert", "key"].into_iter().for_each(|kind| {
                    std::fs::remove_file(folder.join(format!("{end}-{kind}.pem"))).unwrap();
                }),
                Has::Plain => {}
            }
            (!matches!(has, Has::Plain)).then(|| format!("--tls-dir={}", folder.display()))
        };
        fill(&dir.path().join("ram"), 1, Pattern::Mixed { seed: 3 });
        let block = format!("m0={}", dir.path().join("ram").display());
        let theirs = folder("there", "server", destination);
        let mut receive = vec!["receive", "tcp:127.0.0.1:0", "--json"];
        receive.extend(theirs.as_deref());
        receive.push("--dir");
        let mut receiver = Ramwire::start(dir.path(), &receive, dir.path().join("guest"));
        let uri = receiver.listening();
        let send = |name: &str, has| {
            let tls = folder(name, "client", has);
            let mut send = vec!["send", &uri, "--json", "--peer=ramwire"];
            send.extend(tls.as_deref());
            send.push("--ram");
            Ramwire::start(dir.path(), &send, &block)
        };
        let text = send("here", source).failed(Deadline::seconds(60), 3);
        assert!(text.contains(here), "{what}: here {here:?}: {text}");
        let told = || receiver.errors();
        let heard = Deadline::seconds(60).poll("the destination's word", told, || {
            receiver.errors().contains("still listening").then(|| receiver.errors())
        });
        assert!(heard.contains(there), "{what}: there {there:?}: {heard}");
        // The same source is accepted with a valid certificate.
        if let Has::Certificate(Wanted { serial: 1, names: [_, _, _], years: (2020, 2200) }) = destination {
            let report = send("again", good).finished(Deadline::seconds(60), 0);
            assert_eq!(report["status"], "completed", "{what}: {report}");
            assert_eq!(receiver.finished(Deadline::seconds(60), 0)["arrived"], true, "{what}");
        }
    }
}

/// A silent connection and one that stops in the handshake do not block others, and are closed after a while.
#[test]
fn a_source_that_stops_in_the_handshake_makes_nobody_wait() {
    let dir = scratch();
    let certificates = Authority::new("the authority").folder(dir.path().join("certificates"));
    let tls = format!("--tls-dir={}", certificates.display());
    let receive = ["receive", "tcp:127.0.0.1:0", "--json", "--stall-timeout=2", &tls, "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, dir.path().join("guest"));
    let uri = receiver.listening();
    let silent = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    let mut stopped = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    // A handshake record: 512 bytes are announced, and four follow.
    stopped.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252]).unwrap();
    let told = || receiver.errors();
    Deadline::seconds(60).poll("both are closed", told, || {
        (receiver.errors().matches("it has not finished its TLS handshake; still listening").count() == 2)
            .then_some(())
    });
    let _also = TcpStream::connect(uri.strip_prefix("tcp:").unwrap()).unwrap();
    fill(&dir.path().join("ram"), 1, Pattern::Mixed { seed: 3 });
    let send = ["send", &uri, "--json", "--peer=ramwire", &tls, "--ram"];
    let block = format!("m0={}", dir.path().join("ram").display());
    let report = Ramwire::start(dir.path(), &send, block).finished(Deadline::seconds(60), 0);
    assert_eq!(report["status"], "completed", "{report}");
    assert_eq!(receiver.finished(Deadline::seconds(60), 0)["arrived"], true);
    drop((silent, stopped));
}

/// The connection is cut without TLS's own end: no guest arrives, and both ends report what happened.
#[test]
fn a_stream_that_is_cut_on_its_way_does_not_arrive() {
    for carried in [200, 20_000, 1 << 20] {
        let dir = scratch();
        let certificates = Authority::new("the authority").folder(dir.path().join("certificates"));
        let tls = format!("--tls-dir={}", certificates.display());
        let receive = ["receive", "tcp:127.0.0.1:0", "--json", &tls, "--dir"];
        let mut receiver = Ramwire::start(dir.path(), &receive, dir.path().join("guest"));
        let (uri, cutting) = cut_after(&receiver.listening(), carried);
        fill(&dir.path().join("ram"), 4, Pattern::Random { seed: 3 });
        let block = format!("m0={}", dir.path().join("ram").display());
        let send = ["send", &uri, "--json", "--peer=ramwire", &tls, "--ram"];
        let said = Ramwire::start(dir.path(), &send, block).failed(Deadline::seconds(60), 3);
        cutting.join().unwrap();
        let cut = ["reset by peer", "Broken pipe", "ended", "closed", "handshake"];
        assert!(cut.iter().any(|word| said.contains(word)), "{carried}: the source: {said}");
        if carried < 1000 {
            // No stream has begun: the destination waits for the next source.
            let told = || receiver.errors();
            Deadline::seconds(60).poll("the destination's word", told, || {
                let heard = receiver.errors();
                (heard.contains("in the TLS handshake") && heard.contains("still listening")).then_some(())
            });
        } else {
            let heard = receiver.failed(Deadline::seconds(60), 3);
            assert!(heard.contains("the stream ended"), "{carried}: the destination: {heard}");
            assert!(!dir.path().join("guest/manifest.json").exists(), "{carried}: nothing has arrived");
        }
    }
}

/// A forwarder to another address that carries this many bytes to it; then both ends see an end of the connection.
fn cut_after(uri: &str, carried: u64) -> (String, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port());
    let there = uri.strip_prefix("tcp:").unwrap().to_owned();
    let carry = move || {
        let (source, _) = listener.accept().unwrap();
        let destination = TcpStream::connect(there).unwrap();
        let (mut answers, mut back) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        let answering = std::thread::spawn(move || std::io::copy(&mut answers, &mut back));
        std::io::copy(&mut (&source).take(carried), &mut &destination).unwrap();
        destination.shutdown(Shutdown::Both).unwrap();
        source.shutdown(Shutdown::Both).unwrap();
        // It has reached the end, or an error.
        let _ = answering.join().unwrap();
    };
    (here, std::thread::spawn(carry))
}

#[test]
fn what_could_travel_in_clear_is_refused_where_tls_is_required_and_told_where_not() {
    let dir = scratch();
    fill(&dir.path().join("ram"), 1, Pattern::Zero);
    let block = format!("m0={}", dir.path().join("ram").display());
    for uri in ["tcp:10.0.0.7:1", "exec:cat"] {
        let said = Ramwire::start(dir.path(), &["send", uri, "--require-tls", "--ram"], &block)
            .failed(Deadline::seconds(60), 2);
        assert!(said.contains("could travel unencrypted") && said.contains("--tls-dir DIR"), "{uri}: {said}");
    }
    let receive = ["receive", "tcp:0.0.0.0:0", "--require-tls", "--dir"];
    let said =
        Ramwire::start(dir.path(), &receive, dir.path().join("guest")).failed(Deadline::seconds(60), 2);
    assert!(said.contains("tcp:0.0.0.0:0: RAM could travel unencrypted"), "{said}");
    let at_the_loopback = ["receive", "tcp:127.0.0.1:0", "--json", "--require-tls", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &at_the_loopback, dir.path().join("guest"));
    let (told, port) = ("travels unencrypted and unauthenticated", receiver.listening());
    // This host, by an address that is not recognized as the loopback's.
    let port = port.rsplit(':').next().unwrap();
    let uri = format!("tcp:0.0.0.0:{port}");
    let mut sender = Ramwire::start(dir.path(), &["send", &uri, "--json", "--peer=ramwire", "--ram"], &block);
    assert_eq!(sender.finished(Deadline::seconds(60), 0)["status"], "completed");
    assert_eq!(receiver.finished(Deadline::seconds(60), 0)["arrived"], true);
    assert_eq!(sender.errors().matches(told).count(), 1, "{}", sender.errors());
    assert!(!receiver.errors().contains(told), "{}", receiver.errors());
}
