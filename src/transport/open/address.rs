//! Where a stream goes or comes from, written as QEMU writes it.
//!
//! | form | means |
//! |------|-------|
//! | `tcp:HOST:PORT` | a TCP connection; IPv6 in brackets; an empty host is this machine's loopback |
//! | `rdma:HOST:PORT` | the same between RDMA devices |
//! | `auto:HOST:PORT` | RDMA if both ends have a device that reaches the other, else TCP |
//! | `unix:PATH` | a UNIX stream socket |
//! | `fd:N` | a descriptor this process was started with |
//! | `exec:COMMAND` | a shell command's standard input or output |
//! | `file:PATH` | a file that holds the plain stream |
//! | `mapped:PATH[,offset=N]` | a file with a place for every page (mapped-ram), its stream from byte N on |
//!
//! This module only reads and writes the words; [`open`](crate::transport::open) opens what they name.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;

/// Forms this program knows, for messages.
const FORMS: &str =
    "tcp:HOST:PORT, rdma:HOST:PORT, auto:HOST:PORT, unix:PATH, fd:N, exec:COMMAND, file:PATH or mapped:PATH";

/// One end of a byte stream.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Address {
    /// `tcp:HOST:PORT`.
    Tcp {
        /// Name or literal address, without brackets; empty for loopback.
        host: String,
        /// Port; 0 lets the kernel choose one to listen on.
        port: u16,
    },
    /// `rdma:HOST:PORT`.
    Rdma {
        /// Name or literal address of an interface with an RDMA device, without brackets.
        host: String,
        /// Port; 0 lets the kernel choose one to listen on.
        port: u16,
    },
    /// `auto:HOST:PORT`.
    Auto {
        /// As for TCP.
        host: String,
        /// As for TCP; RDMA takes the same.
        port: u16,
    },
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `fd:N`.
    Fd(i32),
    /// `exec:COMMAND`, run by `sh -c`.
    Exec(String),
    /// `file:PATH`.
    File(PathBuf),
    /// `mapped:PATH[,offset=N]`.
    Mapped {
        /// The file.
        path: PathBuf,
        /// Where its stream begins, in bytes.
        offset: u64,
    },
}

/// Why a text is not an [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// No known scheme before the first colon.
    #[error("`{text}` does not start with a known scheme; write {FORMS}")]
    UnknownScheme {
        /// What was given.
        text: String,
    },
    /// The scheme is known, the rest is not what it needs.
    #[error("`{text}`: {problem}; write {form}")]
    Malformed {
        /// What was given.
        text: String,
        /// What is wrong with it.
        problem: &'static str,
        /// How it should look.
        form: &'static str,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let malformed =
            |form| move |problem| AddressError::Malformed { text: text.to_owned(), problem, form };
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(AddressError::UnknownScheme { text: text.to_owned() });
        };
        match scheme {
            "tcp" => parse_host(rest)
                .map(|(host, port)| Self::Tcp { host, port })
                .map_err(malformed("tcp:HOST:PORT, an IPv6 address as tcp:[::1]:4444")),
            "auto" => parse_host(rest)
                .map(|(host, port)| Self::Auto { host, port })
                .map_err(malformed("auto:HOST:PORT, an IPv6 address as auto:[::1]:4444")),
            "rdma" => parse_host(rest)
                .and_then(|(host, port)| match host.as_str() {
                    "" => Err("there is no host"),
                    _ => Ok(Self::Rdma { host, port }),
                })
                .map_err(malformed("rdma:HOST:PORT with an address of the RDMA device's interface")),
            "unix" => parse_path(rest).map(Self::Unix).map_err(malformed("unix:/run/guest.sock")),
            "fd" => parse_fd(rest).map(Self::Fd).map_err(malformed("fd:N with the descriptor's number")),
            "exec" if rest.trim().is_empty() => Err(malformed("exec:COMMAND")("there is no command")),
            "exec" if rest.contains('\0') => {
                Err(malformed("exec:COMMAND")("a command can't hold a NUL byte"))
            }
            "exec" => Ok(Self::Exec(rest.to_owned())),
            "mapped" => parse_mapped(rest)
                .map(|(path, offset)| Self::Mapped { path, offset })
                .map_err(malformed("mapped:/path/of/the/file or mapped:/path/of/the/file,offset=4096")),
            "file" => parse_file(rest).map(Self::File).map_err(malformed("file:/path/of/the/stream")),
            _ => Err(AddressError::UnknownScheme { text: text.to_owned() }),
        }
    }
}

fn parse_host(rest: &str) -> Result<(String, u16), &'static str> {
    let (host, port) = match rest.strip_prefix('[') {
        Some(inner) => {
            let (host, after) = inner.split_once(']').ok_or("the bracket is not closed")?;
            let plain = host.split_once('%').map_or(host, |(address, _zone)| address);
            plain.parse::<Ipv6Addr>().map_err(|_| "what stands in brackets is not an IPv6 address")?;
            (host, after.strip_prefix(':').ok_or("there is no port")?)
        }
        None => {
            let (host, port) = rest.rsplit_once(':').ok_or("there is no port")?;
            if host.contains(':') {
                return Err("an IPv6 address needs brackets");
            }
            (host, port)
        }
    };
    if port.contains(',') {
        return Err("options after the port are not known");
    }
    if host.contains(|c: char| c.is_whitespace() || c.is_control() || "/[],".contains(c)) {
        return Err("the host holds a character no host name has");
    }
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the port is not a number");
    }
    let port = port.parse().map_err(|_| "the port is above 65535")?;
    Ok((host.to_owned(), port))
}

fn parse_path(rest: &str) -> Result<PathBuf, &'static str> {
    if rest.is_empty() {
        return Err("there is no path");
    }
    if rest.contains('\0') {
        return Err("a path can't hold a NUL byte");
    }
    // What is printed is read back line by line.
    if rest.contains(char::is_control) {
        return Err("the path holds a control character, which can't be printed");
    }
    Ok(PathBuf::from(rest))
}

fn parse_file(rest: &str) -> Result<PathBuf, &'static str> {
    // QEMU takes an offset here. Taking it for a part of the name would write to a surprising file.
    if rest.contains(",offset=") {
        return Err("a plain stream starts at offset 0 (mapped: takes one)");
    }
    parse_path(rest)
}

/// The offset is decimal, or hexadecimal behind 0x.
fn parse_mapped(rest: &str) -> Result<(PathBuf, u64), &'static str> {
    let Some((path, offset)) = rest.rsplit_once(",offset=") else { return Ok((parse_path(rest)?, 0)) };
    let digits = |text: &str, hex: bool| {
        let all = text.bytes().all(|byte| if hex { byte.is_ascii_hexdigit() } else { byte.is_ascii_digit() });
        all && !text.is_empty()
    };
    let number = match offset.strip_prefix("0x") {
        Some(hex) if digits(hex, true) => u64::from_str_radix(hex, 16).ok(),
        None if digits(offset, false) => offset.parse().ok(),
        _ => return Err("the offset is not a number"),
    };
    // A file's offsets are signed numbers to the kernel.
    let number =
        number.filter(|number| i64::try_from(*number).is_ok()).ok_or("no file has so high an offset")?;
    // What is printed is read back: a name that ends so would be read as an offset.
    if number == 0 && path.contains(",offset=") {
        return Err("there are two offsets");
    }
    Ok((parse_path(path)?, number))
}

fn parse_fd(rest: &str) -> Result<i32, &'static str> {
    if rest.is_empty() || !rest.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the descriptor is not a number");
    }
    rest.parse().map_err(|_| "no descriptor has so high a number")
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
            Self::Rdma { host, port } if host.contains(':') => write!(f, "rdma:[{host}]:{port}"),
            Self::Rdma { host, port } => write!(f, "rdma:{host}:{port}"),
            Self::Auto { host, port } if host.contains(':') => write!(f, "auto:[{host}]:{port}"),
            Self::Auto { host, port } => write!(f, "auto:{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Fd(number) => write!(f, "fd:{number}"),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Mapped { path, offset: 0 } => write!(f, "mapped:{}", path.display()),
            Self::Mapped { path, offset } => write!(f, "mapped:{},offset={offset}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn tcp(host: &str, port: u16) -> Address {
        Address::Tcp { host: host.into(), port }
    }

    #[test]
    fn every_form_is_read_and_written_alike() {
        for (text, address) in [
            ("tcp:10.0.0.1:4444", tcp("10.0.0.1", 4444)),
            ("tcp::4444", tcp("", 4444)),
            ("tcp:host.example:0", tcp("host.example", 0)),
            ("tcp:[::1]:65535", tcp("::1", 65535)),
            ("tcp:[fe80::1%eth0]:1", tcp("fe80::1%eth0", 1)),
            ("rdma:10.9.0.1:4444", Address::Rdma { host: "10.9.0.1".into(), port: 4444 }),
            ("rdma:[fe80::1]:1", Address::Rdma { host: "fe80::1".into(), port: 1 }),
            ("auto:host.example:4444", Address::Auto { host: "host.example".into(), port: 4444 }),
            ("auto:[::1]:1", Address::Auto { host: "::1".into(), port: 1 }),
            ("unix:/run/a:b.sock", Address::Unix("/run/a:b.sock".into())),
            ("unix: [a],b%c \u{e9}\\n", Address::Unix(" [a],b%c \u{e9}\\n".into())),
            ("fd:0", Address::Fd(0)),
            ("exec:cat > '/tmp/a:b'", Address::Exec("cat > '/tmp/a:b'".into())),
            ("file:relative path", Address::File("relative path".into())),
            ("mapped:/a,b", Address::Mapped { path: "/a,b".into(), offset: 0 }),
            ("mapped:a,offset=4096", Address::Mapped { path: "a".into(), offset: 4096 }),
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
            ("mapped:/a,offset=0x8000000000000000", "so high", "offset="),
            ("mapped:/a,offset=99999999999999999999", "so high", "offset="),
            ("fd:", "not a number", "fd:N"),
            ("fd:-1", "not a number", "fd:N"),
            ("fd:4294967296", "so high", "fd:N"),
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
            let address = tcp(&host, port);
            prop_assert_eq!(address.to_string().parse::<Address>().unwrap(), address);
        }
    }
}
