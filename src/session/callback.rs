//! A panic of the embedder's code must not end a migration without a report: it is treated as a failure like any other.

use super::Error;
pub(super) use crate::observe::named;
use crate::observe::{Caught, caught};

/// Calls the embedder's code; its panic becomes an error with the panic's message. State that `call` changes is left as
/// the panic left it.
pub(super) fn guarded<T>(during: &'static str, call: impl FnOnce() -> T) -> Result<T, Error> {
    caught(during, call).map_err(|Caught { during, text }| Error::Panicked { during, text })
}

/// For calls during cleanup, which must continue: a panic is only logged.
pub(super) fn quietly(during: &'static str, call: impl FnOnce()) {
    if let Err(error) = guarded(during, call) {
        tracing::warn!(%error, "the migration continues");
    }
}
