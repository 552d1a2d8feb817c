//! The table of URI schemes. A new scheme is a row here and the file or folder that the row names.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, LazyLock};

use super::address::{Address, Target};
use super::candidates::Candidates;
#[cfg(not(feature = "rdma"))]
use super::no_rdma as rdma;
use super::{AllowList, ConnectionOptions, OpenError, auto};
use crate::guest::GuestMemory;
use crate::sys::Stop;
use crate::transport::mapped_ram;
#[cfg(feature = "rdma")]
use crate::transport::rdma;
use crate::transport::stream::{exec, file, inherited, tcp, unix};
use crate::transport::{DestinationConnection, SourceConnection, StreamChannel, StreamOptions};

/// All schemes, in the order in which messages and the help text list them.
static SCHEMES: [&Scheme; 8] = [
    &tcp::SCHEME,
    &rdma::SCHEME,
    &auto::SCHEME,
    &unix::SCHEME,
    &inherited::SCHEME,
    &exec::SCHEME,
    &file::SCHEME,
    &mapped_ram::SCHEME,
];

type ListenFn = fn(&Address, AllowList, &Stop) -> Result<Box<dyn Endpoint>, OpenError>;

/// A scheme: its name before the colon, and its functions.
pub(in crate::transport) struct Scheme {
    /// As it is written.
    pub(in crate::transport) name: &'static str,
    /// The whole address, with placeholders.
    pub(in crate::transport) form: &'static str,
    /// The correct form of an address, for the error of an invalid one.
    pub(in crate::transport) hint: &'static str,
    /// Parses the text after the colon.
    ///
    /// # Errors
    /// The problem, as text.
    pub(in crate::transport) parse: fn(&str) -> Result<Target, &'static str>,
    pub(in crate::transport) abilities: SchemeAbilities,
    /// Opens the source's side, for the pages of a guest.
    pub(in crate::transport) open: fn(&Opening<'_>) -> Result<SourceConnection, OpenError>,
    /// Opens the source's side as a bare byte stream.
    pub(in crate::transport) connect: fn(&Address, &StreamOptions, &Stop) -> Result<StreamChannel, OpenError>,
    /// Opens the destination's side.
    pub(in crate::transport) listen: ListenFn,
}

/// What the connections of a scheme can do.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::transport) struct SchemeAbilities {
    /// Several connections are possible: page channels besides the main one.
    pub(in crate::transport) page_channels: bool,
    /// Pages are sent in the stream, so they may be sent as differences.
    pub(in crate::transport) pages_in_stream: bool,
    /// The other end answers, or may: not a file, nor a command.
    pub(in crate::transport) answers: bool,
    /// What TLS can encrypt.
    pub(in crate::transport) tls: TlsCover,
    /// The transport is chosen when the address is opened.
    pub(in crate::transport) decides_late: bool,
}

/// What TLS encrypts of a scheme's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::transport) enum TlsCover {
    /// They can't use it.
    #[default]
    Nothing,
    /// A device moves the pages as they are; all messages are encrypted, and both ends know each other.
    AllButPages,
    /// All bytes.
    Everything,
}

/// The connection to open.
pub(in crate::transport) struct Opening<'a> {
    pub(in crate::transport) address: &'a Address,
    pub(in crate::transport) memory: &'a Arc<dyn GuestMemory>,
    pub(in crate::transport) options: &'a ConnectionOptions,
    pub(in crate::transport) stop: &'a Stop,
}

/// The destination's side of an address.
pub(in crate::transport) trait Endpoint: fmt::Debug + Send {
    /// The addresses it listens on, with the port that the kernel chose. Never empty.
    fn addresses(&self) -> Vec<Address>;

    /// True if hosts of a network can connect.
    fn is_open_to_network(&self) -> bool {
        false
    }

    /// Waits for the next connection, and for all connections that belong to it. If strangers can connect, `candidates`
    /// holds the connections that have not sent their first word.
    ///
    /// # Errors
    /// [`OpenError`].
    fn accept_connection(
        &mut self,
        candidates: &mut Candidates,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError>;

    /// Waits for the next connection that is a byte stream, whatever it sends.
    ///
    /// # Errors
    /// [`OpenError`].
    fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError>;

    /// Why it does not listen for RDMA, although it could have.
    fn why_no_rdma(&self) -> Option<&str> {
        None
    }
}

impl Scheme {
    /// The row of that name.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        SCHEMES.into_iter().find(|scheme| scheme.name == name)
    }
}

/// The row of `rdma:`, whether it is built in or not.
pub(super) fn rdma_scheme() -> &'static Scheme {
    &rdma::SCHEME
}

/// The forms of all addresses, for messages and the help text.
pub(super) fn forms() -> &'static str {
    static FORMS: LazyLock<String> = LazyLock::new(|| {
        let forms: Vec<_> = SCHEMES.iter().map(|scheme| scheme.form).collect();
        match forms.split_last() {
            Some((last, [])) => (*last).to_owned(),
            Some((last, others)) => format!("{} or {last}", others.join(", ")),
            None => String::new(),
        }
    });
    &FORMS
}

impl fmt::Debug for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Scheme {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Scheme {}

impl Hash for Scheme {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

/// Not a byte stream: for a scheme whose pages are sent in another way.
pub(in crate::transport) fn no_stream(
    address: &Address,
    _options: &StreamOptions,
    _stop: &Stop,
) -> Result<StreamChannel, OpenError> {
    Err(OpenError::NotAStream { address: address.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scheme_is_found_by_its_name_and_named_in_messages() {
        for scheme in SCHEMES {
            assert_eq!(Scheme::named(scheme.name), Some(scheme));
            assert!(scheme.form.starts_with(&format!("{}:", scheme.name)), "{}", scheme.form);
            assert!(scheme.hint.starts_with(&format!("{}:", scheme.name)), "{}", scheme.hint);
            assert!(forms().contains(scheme.form), "{}", forms());
        }
        let mut names: Vec<_> = SCHEMES.iter().map(|scheme| scheme.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), SCHEMES.len(), "a name stands twice");
    }
}
