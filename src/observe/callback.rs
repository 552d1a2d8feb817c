//! The embedder's callbacks and their panics: which of them a thread is in, and the panic's message.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static CALLBACK: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// A panic that was caught.
#[derive(Debug)]
pub(crate) struct Caught {
    /// The activity; `calling ..` if the callback is known.
    pub(crate) during: &'static str,
    /// What `panic!` was given.
    pub(crate) text: String,
}

/// Calls code that may call the embedder's. State that `call` changes is left as the panic left it.
pub(crate) fn caught<T>(during: &'static str, call: impl FnOnce() -> T) -> Result<T, Caught> {
    catch_unwind(AssertUnwindSafe(call))
        .map_err(|panic| Caught { during: CALLBACK.take().unwrap_or(during), text: text_of(&*panic) })
}

/// Makes one `call` of the embedder's code. `name` is `calling` and which: a panic is reported with it.
pub(crate) fn named<T>(name: &'static str, call: impl FnOnce() -> T) -> T {
    let before = CALLBACK.replace(Some(name));
    let answer = call();
    CALLBACK.set(before);
    answer
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no text").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_by_the_callback_that_it_came_from() {
        let ended =
            |during| caught(during, || panic!("its words")).map_err(|caught| (caught.during, caught.text));
        assert_eq!(named("calling another", || ended("x")).err().map(|told| told.0), Some("calling another"));
        let inner = caught("sending", || named("calling it", || panic!("its words")));
        let Err(Caught { during, text }) = inner;
        assert_eq!((during, &*text), ("calling it", "its words"));
        // A later panic, outside of any callback, is not reported with that name.
        assert_eq!(ended("sending"), Err::<(), _>(("sending", "its words".to_owned())));
    }
}
