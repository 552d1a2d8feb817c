#![allow(clippy::unwrap_used)]
use super::*;
use crate::transport::mapped_ram;
use crate::transport::stream::{exec, file, inherited};
use proptest::prelude::*;

fn mapped(path: &str, offset: u64) -> Address {
    Address { scheme: &mapped_ram::SCHEME, target: Target::PathAt { path: path.into(), offset }, tls: None }
}

#[test]
fn only_another_host_without_tls_is_in_clear() {
    for (text, clear) in [
        ("tcp:10.0.0.7:1", true),
        ("tcp:host.example:1", true),
        ("tcp:0.0.0.0:1", true),
        ("rdma:10.0.0.7:1", true),
        ("auto:[fd00::7]:1", true),
        ("tcp:127.8.0.1:1", false),
        ("tcp:[::1]:1", false),
        ("tcp:[::ffff:127.0.0.1]:1", false),
        ("tcp:localhost:1", false),
        ("unix:/run/socket", false),
        ("fd:7", false),
        ("exec:nc host 1", false),
    ] {
        let address: Address = text.parse().unwrap();
        assert_eq!(address.is_in_clear(), clear, "{text}");
    }
}

#[test]
fn every_form_is_read_and_written_alike() {
    for (text, address) in [
        ("tcp:10.0.0.1:4444", Address::tcp("10.0.0.1", 4444)),
        ("tcp::4444", Address::tcp("", 4444)),
        ("tcp:host.example:0", Address::tcp("host.example", 0)),
        ("tcp:[::1]:65535", Address::tcp("::1", 65535)),
        ("tcp:[fe80::1%eth0]:1", Address::tcp("fe80::1%eth0", 1)),
        ("rdma:10.9.0.1:4444", Address::rdma("10.9.0.1", 4444)),
        ("rdma:[fe80::1]:1", Address::rdma("fe80::1", 1)),
        ("auto:host.example:4444", Address::auto("host.example", 4444)),
        ("auto:[::1]:1", Address::auto("::1", 1)),
        ("unix:/run/a:b.sock", Address::unix("/run/a:b.sock")),
        ("unix: [a],b%c \u{e9}\\n", Address::unix(" [a],b%c \u{e9}\\n")),
        ("mapped:/a,b", mapped("/a,b", 0)),
        ("mapped:a,offset=4096", mapped("a", 4096)),
        ("fd:0", Address { scheme: &inherited::SCHEME, target: Target::Descriptor(0), tls: None }),
        (
            "exec:cat > '/tmp/a:b'",
            Address { scheme: &exec::SCHEME, target: Target::Command("cat > '/tmp/a:b'".into()), tls: None },
        ),
        (
            "file:relative path",
            Address { scheme: &file::SCHEME, target: Target::Path("relative path".into()), tls: None },
        ),
    ] {
        assert_eq!(text.parse::<Address>().unwrap(), address);
        assert_eq!(address.to_string(), text);
    }
}

#[test]
fn what_is_no_address_is_refused_with_the_form_it_should_have() {
    for (text, problem, form) in [
        ("", "known scheme", "unix:PATH"),
        ("/run/a.sock", "known scheme", "tcp:HOST:PORT"),
        ("ftp:host:21", "known scheme", "file:PATH"),
        ("TCP:host:21", "known scheme", "tcp:"),
        ("tcp:4444", "no port", "tcp:HOST:PORT"),
        ("tcp:::1:4444", "needs brackets", "tcp:[::1]:4444"),
        ("tcp:[::1:4444", "not closed", "tcp:["),
        ("tcp:[::1]4444", "no port", "tcp:["),
        ("tcp:[host]:4444", "not an IPv6 address", "tcp:["),
        ("tcp:host:65536", "above 65535", "PORT"),
        ("tcp:host:+1", "not a number", "PORT"),
        ("tcp:host:", "not a number", "PORT"),
        ("tcp:host:1,to=9", "options", "PORT"),
        ("tcp:a b:1", "character", "HOST"),
        ("rdma::4444", "no host", "rdma:HOST:PORT"),
        ("rdma:10.9.0.1", "no port", "rdma:HOST:PORT"),
        ("auto:4444", "no port", "auto:HOST:PORT"),
        ("unix:", "no path", "unix:/"),
        ("file:", "no path", "file:/"),
        ("file:/a,offset=0x1000", "offset 0", "file:/"),
        ("unix:/run/a\nb", "control character", "unix:/"),
        ("file:a\u{1b}[0m", "control character", "file:/"),
        ("mapped:", "no path", "mapped:/"),
        ("mapped:,offset=1", "no path", "mapped:/"),
        ("mapped:/a,offset=", "not a number", "offset="),
        ("mapped:/a,offset=1M", "not a number", "offset="),
        ("mapped:/a,offset=0x", "not a number", "offset="),
        ("mapped:/a,offset=0x8000000000000000", "larger than any file", "offset="),
        ("mapped:/a,offset=99999999999999999999", "larger than any file", "offset="),
        ("fd:", "not a number", "fd:N"),
        ("fd:-1", "not a number", "fd:N"),
        ("fd:4294967296", "larger than that", "fd:N"),
        ("exec: ", "no command", "exec:COMMAND"),
    ] {
        let message = text.parse::<Address>().unwrap_err().to_string();
        assert!(message.contains(problem) && message.contains(form), "{text}: {message}");
    }
}

proptest! {
    #[test]
    fn any_text_is_read_without_a_panic_and_what_is_read_is_written_back(text in "(tcp|rdma|auto|unix|fd|exec|file|mapped|x)?:?\\PC{0,24}(,offset=[0-9x]{0,9})?") {
        if let Ok(address) = text.parse::<Address>() {
            prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
    }

    #[test]
    fn any_socket_address_survives(v6 in any::<bool>(), bits in any::<u128>(), port in any::<u16>()) {
        let host = if v6 { Ipv6Addr::from_bits(bits).to_string() }
                   else { std::net::Ipv4Addr::from_bits(bits as u32).to_string() };
        let address = Address::tcp(host, port);
        prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
    }
}
