//! Connections through this host's verbs devices.

use std::net::IpAddr;
use std::sync::Arc;

use rdma_hooks::verbs::{VerbsFabric, first_address, memory_lock};
use rdma_hooks::{Fabric, FabricError};

#[cfg(feature = "tls")]
use super::secured;
use super::{RdmaListener, connect_over};
use crate::sys::Stop;
use crate::transport::open::candidates::Candidates;
use crate::transport::open::{Endpoint, Scheme, SchemeAbilities, TlsCover, no_stream, parse_rdma_host};
use crate::transport::{
    Address, AllowList, ConnectionOptions, DestinationConnection, OpenError, StreamChannel, StreamOptions,
    WhyNoRdma,
};

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "rdma",
    form: "rdma:HOST:PORT",
    hint: "rdma:HOST:PORT with an address of the RDMA device's interface",
    parse: parse_rdma_host,
    abilities: SchemeAbilities {
        page_channels: false,
        pages_in_stream: false,
        answers: true,
        tls: TlsCover::AllButPages,
        decides_late: false,
    },
    open: |opening| {
        let (address, rdma) = (opening.address, &opening.options.rdma);
        if rdma.may_discard {
            let why = WhyNoRdma::GuestDiscards;
            return Err(OpenError::NoRdma { address: address.to_string(), why });
        }
        let (host, port) = address.host();
        let fabric = fabric(address)?;
        #[cfg(feature = "tls")]
        let fabric = match address.tls() {
            Some(tls) => secured::beside(fabric, address, tls, &opening.options.stream, opening.stop)?,
            None => fabric,
        };
        let memory = Arc::clone(opening.memory);
        Ok(connect_over(fabric, host, port, memory, &opening.options.stream, rdma, opening.stop)?)
    },
    connect: no_stream,
    listen: |address, allow, _stop| {
        let (host, port) = address.host();
        #[cfg(feature = "tls")]
        if let Some(tls) = address.tls() {
            let bind = |port| RdmaListener::bind_here(host, port, allow.clone());
            return Ok(Box::new(secured::SecuredRdma::bind(address, tls, allow.clone(), _stop, bind)?));
        }
        Ok(Box::new(RdmaListener::bind_here(host, port, allow)?))
    },
};

fn unusable(error: FabricError) -> WhyNoRdma {
    WhyNoRdma::Unusable(Box::new(error))
}

fn fabric(address: &Address) -> Result<Arc<dyn Fabric>, OpenError> {
    let opened = VerbsFabric::open().map_err(unusable);
    opened
        .map(|fabric| Arc::new(fabric) as Arc<dyn Fabric>)
        .map_err(|why| OpenError::NoRdma { address: address.to_string(), why })
}

impl RdmaListener {
    /// Listens on a device of this host.
    pub(in crate::transport) fn bind_here(
        host: &str,
        port: u16,
        allow: AllowList,
    ) -> Result<Self, OpenError> {
        let address = Address::rdma(host, port);
        Self::bind(fabric(&address)?, host, port, allow)
            .map_err(|error| OpenError::NoRdma { address: address.to_string(), why: unusable(error) })
    }
}

impl Endpoint for RdmaListener {
    fn addresses(&self) -> Vec<Address> {
        vec![self.address().clone()]
    }

    /// An RDMA device has no loopback: its peers come from the network.
    fn is_open_to_network(&self) -> bool {
        true
    }

    fn accept_connection(
        &mut self,
        _candidates: &mut Candidates,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        Ok(RdmaListener::accept(self, &options.stream, &options.rdma, stop)?)
    }

    fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        no_stream(self.address(), options, stop)
    }
}

/// An address of an active device, preferring IPv4, if this process may lock `bytes` of memory.
///
/// # Errors
/// [`WhyNoRdma`].
pub fn usable_address(bytes: u64) -> Result<IpAddr, WhyNoRdma> {
    let found = first_address().map_err(unusable)?;
    let address = found.map_err(|names| WhyNoRdma::NoActivePort { devices: names.join(", ") })?;
    memory_lock().check(bytes).map_err(unusable)?;
    Ok(address)
}
