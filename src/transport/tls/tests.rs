#![allow(clippy::unwrap_used)]
use std::io::Write as _;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustls::crypto::{CipherSuiteCommon, CryptoProvider, ring};
use rustls::{SupportedCipherSuite, Tls13CipherSuite};

use super::{Tls, TlsOptions};
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink, ByteSource, StreamChannel, StreamOptions};
use certificates::Authority;

#[path = "../../../tests/common/certificates.rs"]
#[allow(dead_code)]
pub(in crate::transport) mod certificates;

/// The source's end and the destination's.
fn pair(provider: CryptoProvider) -> (StreamChannel, StreamChannel) {
    let (near, far) = UnixStream::pair().unwrap();
    pair_over(provider, near.into(), far.into())
}

fn pair_over(provider: CryptoProvider, near: OwnedFd, far: OwnedFd) -> (StreamChannel, StreamChannel) {
    let dir = tempfile::tempdir().unwrap();
    let folder = Authority::new("the authority").folder(dir.path().join("certificates"));
    let options = TlsOptions::in_dir(folder);
    let client = Tls::client(&options, Arc::new(provider)).unwrap();
    let server = Tls::of_destination(&options).unwrap();
    let end = |socket: OwnedFd, tls| {
        let channel = StreamChannel::from_fd(socket, "peer", &StreamOptions::default()).unwrap();
        channel.over_tls(tls, "localhost").unwrap()
    };
    (end(near, &client), end(far, &server))
}

fn bytes(seed: u8, count: usize) -> Vec<u8> {
    (0..count).map(|at| (at as u8).wrapping_mul(31).wrapping_add((at >> 8) as u8) ^ seed).collect()
}

fn read_all(mut channel: StreamChannel, count: usize) -> Vec<u8> {
    let mut come = vec![0; count];
    let mut filled = 0;
    while filled < count {
        let got = channel.recv(&mut [RecvPart::Own(&mut come[filled..])], &Stop::never()).unwrap();
        assert!(got > 0, "the stream ended at {filled}");
        filled += got;
    }
    come
}

fn is_full(channel: &StreamChannel) -> bool {
    let mut room = [PollFd::from_borrowed_fd(channel.end().0.fd.as_fd(), PollFlags::OUT)];
    rustix::event::poll(&mut room, Some(&Timespec::default())).unwrap() == 0
}

/// Each end has one thread that sends more than any buffer holds, and one that starts to read when no byte moves any
/// more.
#[test]
fn both_directions_may_be_full_at_once() {
    const MUCH: usize = 8 << 20;
    let (near, far) = pair(ring::default_provider());
    let (near, near_back) = near.split();
    let (far, far_back) = far.split();
    thread::scope(|scope| {
        for (seed, mut channel) in [(1, near), (2, far)] {
            scope.spawn(move || channel.send(&[SendPart::Own(&bytes(seed, MUCH))], &Stop::never()).unwrap());
        }
        while !(is_full(&near_back) && is_full(&far_back)) {
            thread::sleep(Duration::from_millis(1));
        }
        for (seed, channel) in [(2, near_back), (1, far_back)] {
            scope.spawn(move || assert!(read_all(channel, MUCH) == bytes(seed, MUCH)));
        }
    });
}

/// The provider of the library, with keys that change after `records` records.
fn changing_keys_after(records: u64) -> CryptoProvider {
    let Some(suite) = ring::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13() else { unreachable!() };
    let suite = Tls13CipherSuite {
        common: CipherSuiteCommon { confidentiality_limit: records, ..suite.common },
        ..*suite
    };
    let cipher_suites = vec![SupportedCipherSuite::Tls13(Box::leak(Box::new(suite)))];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

#[test]
fn a_stream_beyond_what_one_key_is_good_for_goes_on_with_others() {
    const MUCH: usize = 4 << 20;
    // 256 records of 16 KiB.
    let (mut near, far) = pair(changing_keys_after(10));
    thread::scope(|scope| {
        scope.spawn(move || near.send(&[SendPart::Own(&bytes(3, MUCH))], &Stop::never()).unwrap());
        assert!(read_all(far, MUCH) == bytes(3, MUCH));
    });
}

/// OpenSSL's own server, at the end of a UNIX socket.
struct OpenSsl {
    child: Child,
    input: ChildStdin,
    out: PathBuf,
}

impl OpenSsl {
    /// `None` if there is no `openssl` here.
    fn start(dir: &Path, certificates: &Path) -> Option<(Self, UnixStream)> {
        let (socket, out) = (dir.join("socket"), dir.join("out"));
        let file = |name: &str| certificates.join(name).into_os_string();
        let child = Command::new("openssl")
            .args(["s_server", "-naccept", "1", "-tls1_3", "-Verify", "1", "-verify_return_error", "-unix"])
            .arg(&socket)
            .args(["-cert".into(), file("server-cert.pem"), "-key".into(), file("server-key.pem")])
            .args(["-CAfile".into(), file("ca-cert.pem")])
            .stdin(Stdio::piped())
            .stdout(std::fs::File::create(&out).unwrap())
            .stderr(Stdio::null())
            .spawn();
        let Ok(mut child) = child else {
            println!("SKIPPED: openssl, a TLS peer that was written elsewhere");
            return None;
        };
        let input = child.stdin.take().unwrap();
        let mut server = Self { child, input, out };
        loop {
            if let Ok(connected) = UnixStream::connect(&socket) {
                return Some((server, connected));
            }
            assert!(server.child.try_wait().unwrap().is_none(), "{}", server.printed());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn printed(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.out).unwrap()).into_owned()
    }

    /// Types a line and waits until it was read: a letter is a command only at the beginning of what is read.
    fn types(&mut self, line: &[u8]) {
        self.input.write_all(line).unwrap();
        while rustix::io::ioctl_fionread(&self.input).unwrap() > 0 {
            assert!(self.child.try_wait().unwrap().is_none(), "{}", self.printed());
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for OpenSsl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn without(text: Vec<u8>, word: &[u8]) -> Vec<u8> {
    let mut left = text.as_slice();
    let mut out = Vec::new();
    while let Some(first) = left.first() {
        match left.strip_prefix(word) {
            Some(rest) => left = rest,
            None => {
                out.push(*first);
                left = &left[1..];
            }
        }
    }
    out
}

/// A TLS that was written elsewhere asks for other keys, and follows ours.
#[test]
fn openssl_asks_for_other_keys_and_follows_ours() {
    const MUCH: usize = 4 << 20;
    let dir = tempfile::tempdir().unwrap();
    let folder = Authority::new("the authority").folder(dir.path().join("certificates"));
    let Some((mut server, socket)) = OpenSsl::start(dir.path(), &folder) else { return };
    let tls = Tls::client(&TlsOptions::in_dir(&folder), Arc::new(changing_keys_after(10))).unwrap();
    let channel = StreamChannel::from_fd(socket.into(), "openssl", &StreamOptions::default()).unwrap();
    let channel = channel.over_tls(&tls, "localhost").unwrap().shaken(&Stop::never()).unwrap();
    let (mut near, mut back) = channel.split();
    let reads = |back: &mut StreamChannel, wanted: &[u8]| {
        let mut come = Vec::new();
        while come.len() < wanted.len() {
            let mut room = vec![0; wanted.len() - come.len()];
            let got = back.recv(&mut [RecvPart::Own(&mut room)], &Stop::never()).unwrap();
            assert!(got > 0, "the stream ended");
            come.extend_from_slice(&room[..got]);
        }
        assert_eq!(come, wanted);
    };
    server.types(b"with the first key\n");
    reads(&mut back, b"with the first key\n");
    // Its next key, and a request for our next one.
    server.types(b"K\n");
    server.types(b"with the second\n");
    reads(&mut back, b"with the second\n");
    near.send(&[SendPart::Own(&bytes(5, MUCH))], &Stop::never()).unwrap();
    near.finish(&Stop::never()).unwrap();
    // Its answers to our keys: with them unread, the end of the socket would be a reset.
    assert_eq!(read_all_to_end(&mut back), 0);
    drop((near, back));
    assert!(server.child.wait().unwrap().success(), "{}", server.printed());
    // It prints that whenever a record was none of data, as those of new keys are.
    let printed = without(std::fs::read(&server.out).unwrap(), b"Read BLOCK\n");
    let sent = bytes(5, MUCH);
    let at = printed.windows(64).position(|window| window == &sent[..64]).unwrap();
    assert!(printed[at..].starts_with(&sent), "it differs, from {at} on");
}

#[test]
fn a_folder_of_pre_shared_keys_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("keys.psk"), "qemu:00112233445566778899aabbccddeeff\n").unwrap();
    for made in [
        Tls::of_source(&TlsOptions::in_dir(dir.path())),
        Tls::of_destination(&TlsOptions::in_dir(dir.path())),
    ] {
        let said = made.unwrap_err().to_string();
        assert!(
            said.contains("ca-cert.pem: there is none") && said.contains("only certificates are supported"),
            "{said}"
        );
    }
}

#[test]
fn what_was_looked_at_stays_to_be_read_and_the_end_is_told() {
    let (mut near, mut far) = pair(ring::default_provider());
    let sender = thread::spawn(move || {
        near.send(&[SendPart::Own(b"QE"), SendPart::Own(b"VM and more")], &Stop::never()).unwrap();
        near.finish(&Stop::never()).unwrap();
        near
    });
    assert_eq!(&far.peek_word(&Stop::never()).unwrap(), b"QEVM");
    let mut room = [0; 20];
    let (first, second) = room.split_at_mut(2);
    let parts = &mut [RecvPart::Own(first), RecvPart::Own(second)];
    let got = far.recv(parts, &Stop::never()).unwrap();
    assert_eq!(&room[..got], &b"QEVM and more"[..got]);
    let rest = read_all_to_end(&mut far);
    assert_eq!(got + rest, b"QEVM and more".len());
    drop(sender.join());
}

/// It has the stream, and does not read that no byte follows.
#[test]
fn a_peer_that_closes_behind_the_last_byte_has_not_broken_the_connection() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    let by_tcp = pair_over(ring::default_provider(), near.into(), far.into());
    for (mut near, far) in [by_tcp, pair(ring::default_provider())] {
        let sent = bytes(5, 100_000);
        let reader = thread::spawn(move || read_all(far, 100_000));
        near.send(&[SendPart::Own(&sent)], &Stop::never()).unwrap();
        assert!(reader.join().unwrap() == sent);
        near.finish(&Stop::never()).unwrap();
    }
}

fn read_all_to_end(channel: &mut StreamChannel) -> usize {
    let mut all = 0;
    loop {
        match channel.recv(&mut [RecvPart::Own(&mut [0; 100])], &Stop::never()).unwrap() {
            0 => return all,
            got => all += got,
        }
    }
}
