//! Opens an [`Address`].
//!
//! [The table](scheme) is the only place that lists the schemes and their open functions.

mod address;
mod allow;
mod auto;
pub(crate) mod candidates;
mod error;
mod listener;
#[cfg(not(feature = "rdma"))]
mod no_rdma;
mod obstacle;
mod options;
mod retry;
mod scheme;
mod source;

use std::net::IpAddr;

#[cfg(feature = "rdma")]
pub(super) use address::parse_rdma_host;
pub use address::{Address, AddressError, Target};
pub(super) use address::{parse_command, parse_descriptor, parse_file, parse_host, parse_mapped, parse_path};
pub use allow::{AllowError, AllowList};
pub(crate) use candidates::Listening;
pub use error::{OpenError, WhyNoRdma};
pub use listener::Listener;
pub(super) use listener::{OneStream, Sockets};
pub use obstacle::{DECISION_TIMEOUT, Obstacle};
pub use options::{ConnectionOptions, RdmaOptions};
pub(super) use retry::retry_until_listening;
pub(super) use scheme::{Endpoint, Opening, Scheme, SchemeAbilities, TlsCover, no_stream};
pub(super) use source::open_stream;
pub use source::{connect, open_source};

/// Why RDMA was not used where a caller may choose another transport: the obstacle and its details.
pub fn why_no_rdma(error: &OpenError) -> String {
    obstacle::why(error)
}

/// An address of an active RDMA device on this host, preferring IPv4, if this process may lock `bytes` of memory.
///
/// # Errors
/// [`WhyNoRdma`].
pub fn rdma_address(bytes: u64) -> Result<IpAddr, WhyNoRdma> {
    #[cfg(feature = "rdma")]
    return crate::transport::rdma::usable_address(bytes);
    #[cfg(not(feature = "rdma"))]
    {
        let _ = bytes;
        Err(WhyNoRdma::NotBuilt)
    }
}
