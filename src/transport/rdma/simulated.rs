//! Both ends of a connection over the simulated fabric.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use rdma_hooks::sim::{Host, Sim, SimConfig};

#[cfg(feature = "tls")]
use super::secured;
use super::{RdmaListener, connect_over};
use crate::guest::GuestMemory;
use crate::sys::Stop;
#[cfg(feature = "tls")]
use crate::transport::ConnectionOptions;
#[cfg(feature = "tls")]
use crate::transport::open::Endpoint as _;
#[cfg(feature = "tls")]
use crate::transport::open::candidates::Candidates;
use crate::transport::testing::conformance::Ends;
use crate::transport::{AllowList, RdmaOptions, StreamOptions};

/// Each end takes part in the simulation's time from now until its thread ends.
pub(in crate::transport) fn simulated(memory: Arc<dyn GuestMemory>, queue_pairs: u16) -> Ends {
    let sim = Sim::new(SimConfig::default());
    let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let (near, far) = (here.enter(), there.enter());
    // A round is processed when it is over, as a relay does.
    let rdma = RdmaOptions { queue_pairs, wait_after_round: true, ..RdmaOptions::default() };
    let options = StreamOptions::default();
    let mut listener = RdmaListener::bind(Arc::new(there), "10.0.0.2", 4444, AllowList::default()).unwrap();
    let at_source = rdma.clone();
    Ends {
        source: Box::new(move || {
            let (fabric, stop) = (Arc::new(here), Stop::never());
            let made = connect_over(fabric, "10.0.0.2", 4444, memory, &options, &at_source, &stop)?;
            Ok((made, Box::new(near)))
        }),
        destination: Box::new(move || {
            let accepted = listener.accept(&options, &rdma, &Stop::never())?;
            Ok((accepted, Box::new(far)))
        }),
    }
}

/// The same with TLS beside it.
#[cfg(feature = "tls")]
pub(in crate::transport) fn simulated_with_tls(memory: Arc<dyn GuestMemory>, queue_pairs: u16) -> Ends {
    let sim = Sim::new(SimConfig::default());
    let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let (near, far) = (here.enter(), there.enter());
    let rdma = RdmaOptions { queue_pairs, wait_after_round: true, ..RdmaOptions::default() };
    let options = ConnectionOptions { rdma, ..ConnectionOptions::default() };
    let at_source = options.clone();
    let (mut listener, to) = secured::tests::listening(Arc::new(there));
    Ends {
        source: Box::new(move || {
            Ok((secured::tests::connected(Arc::new(here), &to, memory, &at_source)?, Box::new(near)))
        }),
        destination: Box::new(move || {
            let accepted =
                listener.accept_connection(&mut Candidates::default(), &options, &Stop::never())?;
            Ok((accepted, Box::new(far)))
        }),
    }
}
