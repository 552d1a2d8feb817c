//! Other connections to a destination, and where they lead.

use std::collections::VecDeque;
use std::time::Duration;

use crate::sys::Stop;
use crate::transport::{Address, ByteSink, ByteSource, OpenError, StreamChannel, StreamOptions, connect};

/// How long an attempt may take where there is another address to try.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(3);

/// Both directions of another connection to the destination.
pub struct NewConnection {
    /// Where pages and bytes go.
    pub(crate) sink: Box<dyn ByteSink>,
    /// Source of the destination's messages.
    pub(crate) back: Box<dyn ByteSource>,
}

impl NewConnection {
    /// Over a connected socket; `None` for a channel of one direction.
    pub fn over(channel: StreamChannel) -> Option<Self> {
        let (sink, back) = channel.with_return_path();
        back.map(|back| Self { sink: Box::new(sink), back: Box::new(back) })
    }
}

/// Opens further connections to the destination of a running migration.
pub trait Reconnect: Send {
    /// Connects to `address`; `None`: to the known address of the destination.
    ///
    /// # Errors
    /// [`OpenError`]. It is called again, for as long as the migration's settings allow.
    fn connect(&mut self, address: Option<&Address>, stop: &Stop) -> Result<NewConnection, OpenError>;

    /// False if no call of [`connect`](Self::connect) without an address can succeed, so that the loss of the connection is
    /// the end.
    fn may_connect(&self) -> bool {
        true
    }

    /// The connection that was made last led nowhere: it was lost, or nothing came on it, before the destination had agreed to
    /// go on. Called before the next attempt, which may go elsewhere; by default nothing happens.
    fn led_nowhere(&mut self) {}
}

/// Connects to one address or to others of the same destination, or to the one that last replaced them.
#[derive(Clone, Debug)]
pub struct Redial {
    address: Address,
    options: StreamOptions,
    /// Where else the destination may be reached.
    others: VecDeque<Address>,
}

impl Redial {
    /// Connects to `address`, a `tcp:` or `unix:` one; for `auto:` to the TCP address. Any other, such as `rdma:`, exists
    /// only once, and is left for [others](Self::with_fallbacks). A later address uses TLS if this one does.
    pub fn new(address: Address, options: StreamOptions) -> Self {
        let tcp = address.host_and_port().filter(|_| address.decides_late());
        let tcp = tcp.map(|(host, port)| Address::tcp(host, port).with_tls_of(&address));
        let address = tcp.unwrap_or(address);
        Self { address, options, others: VecDeque::new() }
    }

    /// Other addresses at which the same destination listens, in the order in which they are tried: each attempt that fails is
    /// followed by one to the next address, and so is a connection on which the destination does not answer. They use TLS if
    /// the first address does.
    pub fn with_fallbacks(mut self, fallbacks: impl IntoIterator<Item = Address>) -> Self {
        self.others = fallbacks.into_iter().map(|address| address.with_tls_of(&self.address)).collect();
        if !is_stream(&self.address)
            && let Some(first) = self.others.pop_front()
        {
            self.address = first;
        }
        self
    }

    /// Connects to the present address, or makes the next one the present.
    fn connect_once(&mut self, stop: &Stop) -> Result<NewConnection, OpenError> {
        let once = |address: &Address| OpenError::OnlyOne { address: address.to_string() };
        // A descriptor, a command or a file exists only once.
        if !is_stream(&self.address) {
            return Err(once(&self.address));
        }
        let stop = if self.others.is_empty() { stop.clone() } else { stop.within(ATTEMPT_TIMEOUT) };
        let channel = connect(&self.address, &self.options, &stop)?;
        NewConnection::over(channel).ok_or_else(|| once(&self.address))
    }
}

/// Connections can be made there again and again.
fn is_stream(address: &Address) -> bool {
    matches!(address.scheme(), "tcp" | "unix")
}

impl Reconnect for Redial {
    fn connect(&mut self, address: Option<&Address>, stop: &Stop) -> Result<NewConnection, OpenError> {
        if let Some(address) = address {
            *self = Self::new(address.clone().with_tls_of(&self.address), self.options);
        }
        let connected = self.connect_once(stop);
        if connected.is_err() {
            self.led_nowhere();
        }
        connected
    }

    fn may_connect(&self) -> bool {
        std::iter::once(&self.address).chain(&self.others).any(is_stream)
    }

    fn led_nowhere(&mut self) {
        if let Some(next) = self.others.pop_front() {
            self.others.push_back(std::mem::replace(&mut self.address, next));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::TcpListener;

    use super::*;

    /// An address that takes connections and serves none is left for the next one, and comes again behind the last.
    #[test]
    fn an_address_that_leads_nowhere_is_followed_by_the_next() {
        let listeners = [0, 1, 2].map(|_| TcpListener::bind("127.0.0.1:0").unwrap());
        let addresses = listeners
            .each_ref()
            .map(|listener| Address::tcp("127.0.0.1", listener.local_addr().unwrap().port()));
        let [first, others @ ..] = addresses.clone();
        let mut redial = Redial::new(first, StreamOptions::default()).with_fallbacks(others);
        let mut connects = |leads_nowhere: bool| {
            if leads_nowhere {
                redial.led_nowhere();
            }
            let _connection = redial.connect(None, &Stop::never()).unwrap();
            addresses.iter().position(|address| *address == redial.address).unwrap()
        };
        assert_eq!([false, false, true, true, false, true].map(&mut connects), [0, 0, 1, 2, 2, 0]);
    }

    /// A device that has failed is not asked again.
    #[test]
    fn an_rdma_address_is_left_for_a_stream_and_leads_nowhere_alone() {
        let redial = |address: &str| Redial::new(address.parse().unwrap(), StreamOptions::default());
        assert!(!redial("rdma:10.0.0.7:4444").may_connect() && !redial("fd:3").may_connect());
        let beside = redial("rdma:10.0.0.7:4444").with_fallbacks([Address::tcp("10.0.0.7", 4445)]);
        assert_eq!((beside.address.to_string(), beside.others.len()), ("tcp:10.0.0.7:4445".into(), 0));
        let auto = redial("auto:10.0.0.7:4444");
        assert!(auto.may_connect() && beside.may_connect());
        assert_eq!(auto.address.to_string(), "tcp:10.0.0.7:4444");
    }
}
