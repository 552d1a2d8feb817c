//! The destination's side of an address.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use super::allow::Refused;
use super::candidates::{self, Candidates, Listening, MAIN, MAIN_AND_PAGES, TellFn};
use super::scheme::{Endpoint, TlsCover};
use super::source::check_tls;
use super::{Address, AllowList, ConnectionOptions, OpenError, Target};
use crate::error::Remedy;
use crate::sys::Stop;
use crate::transport::{
    ChannelError, ChosenTransport, DestinationConnection, MultifdDestination, StreamChannel, StreamOptions,
    Tls, multifd,
};

/// The destination's side of an address: waits for connections, or opens a file to read.
///
/// It is dropped once the migration has its channels, so that no other host can connect.
#[derive(Debug)]
pub struct Listener {
    endpoint: Box<dyn Endpoint>,
    /// Never empty.
    addresses: Vec<Address>,
    candidates: Candidates,
    refused: Arc<Refused>,
}

impl Listener {
    /// Listens. For a TCP address without a host only this machine can connect; `allow` restricts the hosts further.
    /// `fd:N` may be a socket that listens already.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn bind(address: &Address, allow: AllowList, stop: &Stop) -> Result<Self, OpenError> {
        // Whether a descriptor is a socket that others connect to is known when it is opened.
        if !matches!(address.target(), Target::Descriptor(_)) {
            check_tls(address)?;
        }
        let refused = allow.refused();
        let endpoint = (address.row().listen)(address, allow, stop)?;
        let addresses = endpoint.addresses();
        Ok(Self { endpoint, addresses, candidates: Candidates::default(), refused })
    }

    /// The address it listens on, with the port that the kernel chose: the first of [`addresses`](Self::addresses).
    pub fn address(&self) -> &Address {
        &self.addresses[0]
    }

    /// All addresses it listens on: a host's name may have several. A source can use any of them as printed.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// A warning for the operator before a guest arrives by this transport.
    pub fn warning(&self) -> Option<String> {
        let address = self.address();
        if !self.endpoint.is_open_to_network() {
            return None;
        }
        match (address.tls(), address.row().abilities.tls) {
            (None, _) => Some(format!(
                "{address}: guest RAM travels unencrypted and unauthenticated; {}",
                Remedy::AllowPeers
            )),
            (Some(_), TlsCover::AllButPages) if self.why_no_rdma().is_none() => {
                Some(format!("{address}: by RDMA the pages of guest RAM travel unencrypted, and only they"))
            }
            (Some(_), _) => None,
        }
    }

    /// Makes it call `tell` for each connection that was closed because it does not begin like a migration, and for each
    /// host that may not connect, up to a maximum number; without it only the log has them.
    pub fn on_stranger(&mut self, tell: impl Fn(&str) + Send + Sync + 'static) {
        let tell: Arc<TellFn> = Arc::new(tell);
        self.candidates.tell(Arc::clone(&tell));
        self.refused.tell(tell);
    }

    /// Why it listens on TCP only for an `auto:` address.
    pub fn why_no_rdma(&self) -> Option<&str> {
        self.endpoint.why_no_rdma()
    }

    /// Waits for a source, by any kind of connection.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn accept_connection(
        &mut self,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        if options.channels.count > 0 && !self.address().row().abilities.page_channels {
            return Err(OpenError::NoChannels { address: self.address().to_string() });
        }
        self.endpoint.accept_connection(&mut self.candidates, options, stop)
    }

    /// Waits for the next connection that is a byte stream, whatever it sends. One that has come beside the first of a
    /// source, and has said nothing, is the next.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::OnlyOne`] at the second call where the address is one stream.
    pub fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        match self.candidates.take_silent() {
            Some(silent) => Ok(silent),
            None => self.endpoint.accept(options, stop),
        }
    }

    /// True if other connections have come that have not said what they are: those of a stranger, or a source's
    /// connection for urgent pages (QEMU 7.2: postcopy-preempt). They end with this listener. Waits a tenth of a second
    /// at most: a source makes the second connection beside its first bytes, and its host may be busy.
    pub fn has_others(&mut self) -> bool {
        let stop = Stop::never().within(OTHERS_TIME);
        self.candidates.are_waiting() || self.accept(&StreamOptions::default(), &stop).is_ok()
    }
}

/// How long [`Listener::has_others`] waits.
const OTHERS_TIME: Duration = Duration::from_millis(100);

/// Listening sockets: each connection is a byte stream, and a migration may use several.
#[derive(Debug)]
pub(in crate::transport) struct Sockets<L> {
    pub(in crate::transport) listening: L,
    pub(in crate::transport) addresses: Vec<Address>,
    pub(in crate::transport) open_to_network: bool,
    /// TLS settings, if each connection is to be encrypted.
    pub(in crate::transport) tls: Option<Tls>,
}

/// Listening sockets whose connections use TLS if required.
impl<L: Listening> Listening for Sockets<L> {
    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.listening.sockets()
    }

    fn place(&self) -> String {
        self.listening.place()
    }

    fn take(&self, options: &StreamOptions) -> Result<Option<StreamChannel>, ChannelError> {
        let taken = self.listening.take(options)?;
        let Some(tls) = &self.tls else { return Ok(taken) };
        let Some(channel) = taken else { return Ok(None) };
        let peer = channel.peer().to_owned();
        let doing = "accepting a connection";
        Ok(Some(channel.over_tls(tls, "").map_err(|source| ChannelError::Tls { peer, doing, source })?))
    }
}

impl<L: Listening + std::fmt::Debug + Send> Endpoint for Sockets<L> {
    fn addresses(&self) -> Vec<Address> {
        self.addresses.clone()
    }

    fn is_open_to_network(&self) -> bool {
        self.open_to_network
    }

    fn accept_connection(
        &mut self,
        candidates: &mut Candidates,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        let (address, channels) = (&self.addresses[0], &options.channels);
        let way = ChosenTransport::named(address);
        let mut next = |wanted, stop: &Stop| candidates.next(&*self, wanted, &options.stream, stop);
        if channels.count == 0 {
            return Ok(DestinationConnection::over(next((&MAIN, 1), stop)?).by(way));
        }
        let expected = usize::from(channels.count) + 1;
        let next = |stop: &Stop| next((&MAIN_AND_PAGES, expected), stop);
        let (main, pages) =
            multifd::accept(channels.count, &address.to_string(), &options.stream, stop, next)?;
        let (main, back) = main.with_return_path();
        let link = MultifdDestination::new(main, pages, channels.clone(), options.stream.stall);
        let back = back.map(|back| Box::new(back) as Box<_>);
        Ok(DestinationConnection::new(Box::new(link), back).by(way))
    }

    fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        Ok(candidates::accept(self, options, stop)?)
    }
}

/// Opens the only stream of an address for reading.
pub(in crate::transport) type OpenFn = fn(&Address, &StreamOptions) -> Result<StreamChannel, OpenError>;

/// A single stream, opened by the first accept, only by this program.
#[derive(Debug)]
pub(in crate::transport) struct OneStream {
    address: Address,
    open: OpenFn,
    opened: bool,
}

impl OneStream {
    pub(in crate::transport) fn at(address: &Address, open: OpenFn) -> Box<dyn Endpoint> {
        Box::new(Self { address: address.clone(), open, opened: false })
    }
}

impl Endpoint for OneStream {
    fn addresses(&self) -> Vec<Address> {
        vec![self.address.clone()]
    }

    fn accept_connection(
        &mut self,
        _candidates: &mut Candidates,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        let channel = self.accept(&options.stream, stop)?;
        Ok(DestinationConnection::over(channel).by(ChosenTransport::named(&self.address)))
    }

    fn accept(&mut self, options: &StreamOptions, _stop: &Stop) -> Result<StreamChannel, OpenError> {
        if std::mem::replace(&mut self.opened, true) {
            return Err(OpenError::OnlyOne { address: self.address.to_string() });
        }
        (self.open)(&self.address, options)
    }
}
