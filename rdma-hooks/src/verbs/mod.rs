//! The fabric over librdmacm and libibverbs, and the promise that makes memory fit for it.
//!
//! The libraries are loaded at run time: if they or a device are missing, [`VerbsFabric::open`] reports it, and the
//! same binary still runs. This is the only module of this crate with `unsafe` code. Its types own what they name, and
//! what they depend on is kept alive by `Arc`:
//!
//! ```text
//! Endpoint -> Queue (QP, CQs, buffers) -> Id (connection manager) -> EventChannel
//! Registration -> Domain (PD) -> Id;   Registration -> HostRegion -> the embedder's mapping
//! ```
//!
//! # Source
//!
//! Manual pages `rdma_cm(7)`, `rdma_connect(3)`, `ibv_reg_mr(3)`, `ibv_post_send(3)`, `ibv_get_cq_event(3)`.

#![allow(unsafe_code)]

mod pinned;

#[cfg(feature = "verbs")]
mod addresses;
#[cfg(feature = "verbs")]
mod call;
#[cfg(feature = "verbs")]
mod cm;
#[cfg(feature = "verbs")]
mod device;
#[cfg(feature = "verbs")]
mod domain;
#[cfg(feature = "verbs")]
mod endpoint;
#[cfg(feature = "verbs")]
mod fabric;
#[cfg(feature = "verbs")]
mod lane;
#[cfg(feature = "verbs")]
mod memory_lock;
#[cfg(feature = "verbs")]
mod queue;
#[cfg(feature = "verbs")]
mod reads;

pub use pinned::PinnedSpan;

#[cfg(feature = "verbs")]
pub use addresses::first_address;
#[cfg(feature = "verbs")]
pub use device::{DeviceInfo, LinkLayer, PortInfo, PortState, devices};
#[cfg(feature = "verbs")]
pub use fabric::VerbsFabric;
#[cfg(feature = "verbs")]
pub use lane::{Lane, LaneListener, LaneOp, LaneParams, Polled};
#[cfg(feature = "verbs")]
pub use memory_lock::{MemoryLock, memory_lock};
