//! `ramwire` moves the RAM of a running virtual machine to another host.
//!
//! The crate is laid out in floors; imports point down only, which `ci/floors` checks.
//!
//! | floor | rooms | duty |
//! |-------|-------|------|
//! | nouns | [`units`] | types with units |

pub mod engine;
pub mod error;
pub mod guest;
pub mod observe;
pub mod page;
pub mod ram;
pub mod session;
pub mod stream;
pub mod sys;
pub mod transport;
pub mod units;
