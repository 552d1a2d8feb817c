//! What the embedder's code does must not end a migration without its report: a panic there is a failure like any other.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::Error;

/// Calls the embedder's code; its panic becomes an error with its text. What `call` changes is left as the panic left it.
pub(super) fn guarded<T>(during: &'static str, call: impl FnOnce() -> T) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| Error::Panicked { during, text: text_of(&*panic) })
}

/// For what is done on the way out, whatever happens: a panic is logged.
pub(super) fn quietly(during: &'static str, call: impl FnOnce()) {
    if let Err(error) = guarded(during, call) {
        tracing::warn!(%error, "the migration goes on");
    }
}

/// What `panic!` was given.
pub(super) fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text").to_owned()
}
