//! Connections for tests: in memory, and with faults.

#[cfg(test)]
pub(super) mod conformance;
mod fault;
mod loopback;
mod random;

pub use fault::{Fault, FaultKind, Faulty};
pub use loopback::{Loopback, LoopbackSink, LoopbackSource, loopback};
pub(crate) use random::Random;
