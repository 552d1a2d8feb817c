//! The address of a stream, written as QEMU writes it: a scheme, a colon, and the scheme's parameters.
//!
//! This module only parses and prints addresses; [the table of schemes](super::scheme) opens them.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::auto;
use super::scheme::{Scheme, forms, rdma_scheme};
use crate::transport::Tls;
use crate::transport::stream::{tcp, unix};

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    scheme: &'static Scheme,
    target: Target,
    /// TLS settings of its connections, if they use TLS.
    tls: Option<Tls>,
}

/// The parameters of an address, without its scheme.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Target {
    /// `HOST:PORT`.
    Host {
        /// Name or literal address, without brackets; empty for loopback if the scheme allows it.
        host: String,
        /// Port; 0 lets the kernel choose one to listen on.
        port: u16,
    },
    /// `PATH`.
    Path(PathBuf),
    /// `PATH[,offset=N]`.
    PathAt {
        /// The file.
        path: PathBuf,
        /// Offset at which its stream begins, in bytes.
        offset: u64,
    },
    /// `N`, a descriptor this process was started with.
    Descriptor(i32),
    /// `COMMAND`, run by `sh -c`.
    Command(String),
}

impl Address {
    /// `tcp:HOST:PORT`.
    pub fn tcp(host: impl Into<String>, port: u16) -> Self {
        Self::of_host(&tcp::SCHEME, host, port)
    }

    /// `rdma:HOST:PORT`.
    pub fn rdma(host: impl Into<String>, port: u16) -> Self {
        Self::of_host(rdma_scheme(), host, port)
    }

    /// `auto:HOST:PORT`.
    pub fn auto(host: impl Into<String>, port: u16) -> Self {
        Self::of_host(&auto::SCHEME, host, port)
    }

    /// `unix:PATH`.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self { scheme: &unix::SCHEME, target: Target::Path(path.into()), tls: None }
    }

    fn of_host(scheme: &'static Scheme, host: impl Into<String>, port: u16) -> Self {
        Self { scheme, target: Target::Host { host: host.into(), port }, tls: None }
    }

    /// The same address with TLS: on every connection to it, or on every incoming one. It is written as before.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// TLS settings of its connections, if they use TLS.
    pub fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    /// The supported forms of addresses in one line, for the help text.
    pub fn forms() -> &'static str {
        forms()
    }

    /// The text before the first colon.
    pub fn scheme(&self) -> &'static str {
        self.scheme.name
    }

    /// The parameters after the colon.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// True if a destination's answers come back on it. For a descriptor it is unknown: true.
    pub fn carries_answers(&self) -> bool {
        self.scheme.abilities.answers
    }

    /// True for `auto:`: the transport is chosen when it is opened, and [`ChosenTransport`](crate::transport::ChosenTransport) reports it.
    pub fn decides_late(&self) -> bool {
        self.scheme.abilities.decides_late
    }

    /// True if RAM would be sent over a network unencrypted and unauthenticated: to a host other than this one, without
    /// TLS. A name counts as another host, unless it is `localhost`. For a descriptor or a command it is unknown:
    /// false.
    pub fn is_in_clear(&self) -> bool {
        let Some((host, _)) = self.host_and_port() else { return false };
        let loopback = match host.parse::<std::net::IpAddr>() {
            Ok(address) => address.to_canonical().is_loopback(),
            Err(_) => host.is_empty() || host == "localhost",
        };
        !loopback && self.tls.is_none()
    }

    /// Host and port, if the address has them.
    pub fn host_and_port(&self) -> Option<(&str, u16)> {
        match &self.target {
            Target::Host { host, port } => Some((host, *port)),
            _ => None,
        }
    }

    /// The path, if the address has one.
    pub fn path(&self) -> Option<&Path> {
        match &self.target {
            Target::Path(path) | Target::PathAt { path, .. } => Some(path),
            _ => None,
        }
    }

    // The `parse` of a scheme has set the parameters that its row uses.

    /// Host and port of a scheme that has them.
    pub(in crate::transport) fn host(&self) -> (&str, u16) {
        self.host_and_port().unwrap_or_default()
    }

    /// Path of a scheme that has one.
    pub(in crate::transport) fn file(&self) -> &Path {
        self.path().unwrap_or(Path::new(""))
    }

    /// Path of a scheme that has one, and the offset in the file at which it begins.
    pub(in crate::transport) fn file_at(&self) -> (&Path, u64) {
        match &self.target {
            Target::PathAt { path, offset } => (path, *offset),
            _ => (self.file(), 0),
        }
    }

    /// Command of a scheme that has one.
    pub(in crate::transport) fn command(&self) -> &str {
        match &self.target {
            Target::Command(command) => command,
            _ => "",
        }
    }

    /// Number of a scheme that has one.
    pub(in crate::transport) fn descriptor(&self) -> i32 {
        match &self.target {
            Target::Descriptor(number) => *number,
            _ => -1,
        }
    }

    pub(super) fn row(&self) -> &'static Scheme {
        self.scheme
    }
}

/// Why a text is not a valid [`Address`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// No known scheme before the first colon.
    #[error("`{text}` does not start with a known scheme; write {}", forms())]
    UnknownScheme {
        /// The given text.
        text: String,
    },
    /// The scheme is known, but the parameters are not valid for it.
    #[error("`{text}`: {problem}; write {form}")]
    Malformed {
        /// The given text.
        text: String,
        /// The problem.
        problem: &'static str,
        /// How it should look.
        form: &'static str,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let row = text.split_once(':').and_then(|(name, rest)| Some((Scheme::named(name)?, rest)));
        let Some((scheme, rest)) = row else {
            return Err(AddressError::UnknownScheme { text: text.to_owned() });
        };
        let target = (scheme.parse)(rest).map_err(|problem| AddressError::Malformed {
            text: text.to_owned(),
            problem,
            form: scheme.hint,
        })?;
        Ok(Self { scheme, target, tls: None })
    }
}

/// `HOST:PORT`.
pub(in crate::transport) fn parse_host(rest: &str) -> Result<Target, &'static str> {
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
        return Err("the host has a character that no host name may have");
    }
    if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the port is not a number");
    }
    let port = port.parse().map_err(|_| "the port is above 65535")?;
    Ok(Target::Host { host: host.to_owned(), port })
}

/// The same, with a host.
pub(in crate::transport) fn parse_rdma_host(rest: &str) -> Result<Target, &'static str> {
    match parse_host(rest)? {
        Target::Host { host, .. } if host.is_empty() => Err("there is no host"),
        target => Ok(target),
    }
}

/// `PATH`.
pub(in crate::transport) fn parse_path(rest: &str) -> Result<Target, &'static str> {
    checked_path(rest).map(Target::Path)
}

fn checked_path(rest: &str) -> Result<PathBuf, &'static str> {
    if rest.is_empty() {
        return Err("there is no path");
    }
    if rest.contains('\0') {
        return Err("a path can't hold a NUL byte");
    }
    // The output is parsed line by line.
    if rest.contains(char::is_control) {
        return Err("the path holds a control character, which can't be printed");
    }
    Ok(PathBuf::from(rest))
}

/// The path of a plain stream.
pub(in crate::transport) fn parse_file(rest: &str) -> Result<Target, &'static str> {
    // QEMU accepts an offset here. Treating it as part of the name would write to the wrong file.
    if rest.contains(",offset=") {
        return Err("a plain stream starts at offset 0 (mapped: takes one)");
    }
    parse_path(rest)
}

/// `PATH[,offset=N]`. The offset is decimal, or hexadecimal after 0x.
pub(in crate::transport) fn parse_mapped(rest: &str) -> Result<Target, &'static str> {
    let at = |path: &str, offset| Ok(Target::PathAt { path: checked_path(path)?, offset });
    let Some((path, offset)) = rest.rsplit_once(",offset=") else { return at(rest, 0) };
    let digits = |text: &str, hex: bool| {
        let all = text.bytes().all(|byte| if hex { byte.is_ascii_hexdigit() } else { byte.is_ascii_digit() });
        all && !text.is_empty()
    };
    let number = match offset.strip_prefix("0x") {
        Some(hex) if digits(hex, true) => u64::from_str_radix(hex, 16).ok(),
        None if digits(offset, false) => offset.parse().ok(),
        _ => return Err("the offset is not a number"),
    };
    // File offsets are signed numbers in the kernel.
    let number =
        number.filter(|number| i64::try_from(*number).is_ok()).ok_or("the offset is larger than any file")?;
    // The output is parsed again: a name that ends like this would be parsed as an offset.
    if number == 0 && path.contains(",offset=") {
        return Err("there are two offsets");
    }
    at(path, number)
}

/// `N`.
pub(in crate::transport) fn parse_descriptor(rest: &str) -> Result<Target, &'static str> {
    if rest.is_empty() || !rest.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("the descriptor is not a number");
    }
    rest.parse().map(Target::Descriptor).map_err(|_| "the number is larger than that of any descriptor")
}

/// `COMMAND`.
pub(in crate::transport) fn parse_command(rest: &str) -> Result<Target, &'static str> {
    match rest {
        _ if rest.trim().is_empty() => Err("there is no command"),
        _ if rest.contains('\0') => Err("a command can't hold a NUL byte"),
        _ => Ok(Target::Command(rest.to_owned())),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.scheme.name;
        match &self.target {
            Target::Host { host, port } if host.contains(':') => write!(f, "{scheme}:[{host}]:{port}"),
            Target::Host { host, port } => write!(f, "{scheme}:{host}:{port}"),
            Target::Path(path) => write!(f, "{scheme}:{}", path.display()),
            Target::PathAt { path, offset: 0 } => write!(f, "{scheme}:{}", path.display()),
            Target::PathAt { path, offset } => write!(f, "{scheme}:{},offset={offset}", path.display()),
            Target::Descriptor(number) => write!(f, "{scheme}:{number}"),
            Target::Command(command) => write!(f, "{scheme}:{command}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transport::mapped_ram;
    use crate::transport::stream::{exec, file, inherited};
    use proptest::prelude::*;

    fn mapped(path: &str, offset: u64) -> Address {
        Address {
            scheme: &mapped_ram::SCHEME,
            target: Target::PathAt { path: path.into(), offset },
            tls: None,
        }
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
                Address {
                    scheme: &exec::SCHEME,
                    target: Target::Command("cat > '/tmp/a:b'".into()),
                    tls: None,
                },
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
}
