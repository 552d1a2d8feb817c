#![allow(clippy::unwrap_used)]
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
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
mod certificates;

/// The source's end and the destination's.
fn pair(provider: CryptoProvider) -> (StreamChannel, StreamChannel) {
    let dir = tempfile::tempdir().unwrap();
    let folder = Authority::new("the authority").folder(dir.path().join("certificates"));
    let options = TlsOptions::in_dir(folder);
    let client = Tls::client(&options, Arc::new(provider)).unwrap();
    let server = Tls::of_destination(&options).unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let end = |socket: UnixStream, tls| {
        let channel = StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap();
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

fn read_all_to_end(channel: &mut StreamChannel) -> usize {
    let mut all = 0;
    loop {
        match channel.recv(&mut [RecvPart::Own(&mut [0; 100])], &Stop::never()).unwrap() {
            0 => return all,
            got => all += got,
        }
    }
}
