//! What the embedder's code does must not end a migration without its report: a panic there is a failure like any other.

use super::Error;
pub(super) use crate::observe::named;
use crate::observe::{Caught, caught};

/// Calls the embedder's code; its panic becomes an error with its text. What `call` changes is left as the panic left it.
pub(super) fn guarded<T>(during: &'static str, call: impl FnOnce() -> T) -> Result<T, Error> {
    caught(during, call).map_err(|Caught { during, text }| Error::Panicked { during, text })
}

/// For what is done on the way out, whatever happens: a panic is logged.
pub(super) fn quietly(during: &'static str, call: impl FnOnce()) {
    if let Err(error) = guarded(during, call) {
        tracing::warn!(%error, "the migration goes on");
    }
}
