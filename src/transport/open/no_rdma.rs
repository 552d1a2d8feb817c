//! `rdma:` in a program that was built without it: the address can be parsed but not opened.

use super::address::parse_rdma_host;
use super::scheme::{Scheme, SchemeAbilities, TlsCover, no_stream};
use super::{Address, OpenError, WhyNoRdma};

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
    open: |opening| Err(not_built(opening.address)),
    connect: no_stream,
    listen: |address, _, _| Err(not_built(address)),
};

fn not_built(address: &Address) -> OpenError {
    OpenError::NoRdma { address: address.to_string(), why: WhyNoRdma::NotBuilt }
}
