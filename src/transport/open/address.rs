//! The address of a stream, written as QEMU writes it: a scheme, a colon, and the scheme's parameters.
//!
//! This module only parses and prints addresses; [the table of schemes](super::scheme) opens them.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::auto;
use super::scheme::{Scheme, TlsCover, forms, rdma_scheme};
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

    /// The same address with the TLS settings of `other`, if it has none itself.
    #[must_use]
    pub(crate) fn with_tls_of(self, other: &Self) -> Self {
        Self { tls: self.tls.or_else(|| other.tls.clone()), ..self }
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

    /// True if RAM would be sent over a network unencrypted: to a host other than this one, without TLS or by RDMA, whose
    /// pages TLS does not encrypt; `auto:` may choose RDMA. A name counts as another host, unless it is `localhost`. For a
    /// descriptor or a command it is unknown: false.
    pub fn is_in_clear(&self) -> bool {
        let Some((host, _)) = self.host_and_port() else { return false };
        let loopback = match host.parse::<std::net::IpAddr>() {
            Ok(address) => address.to_canonical().is_loopback(),
            Err(_) => host.is_empty() || host == "localhost",
        };
        !loopback && (self.tls.is_none() || self.scheme.abilities.tls != TlsCover::Everything)
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
mod tests;
