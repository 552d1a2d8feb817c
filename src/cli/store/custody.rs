//! What a folder says of its guest while the guest is sent.
//!
//! Until the device state leaves nothing has been given away, and the manifest stays as it was: the process may be killed
//! at any moment. From there on until the end is known it says `sending`.

use std::sync::{Mutex, PoisonError};

use super::{Manifest, State, Store, StoreError};

/// The manifest of a guest that is sent. All threads may mark it.
pub struct Custody {
    before: State,
    inner: Mutex<Inner>,
}

struct Inner {
    store: Store,
    manifest: Manifest,
}

impl Custody {
    pub(super) fn new(store: Store, manifest: Manifest) -> Self {
        Self { before: manifest.unless_given(), inner: Mutex::new(Inner { store, manifest }) }
    }

    /// Puts the new state on the disk.
    ///
    /// # Errors
    /// [`StoreError`]; the old state stands.
    pub fn mark(&self, state: State) -> Result<(), StoreError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.manifest.state == state {
            return Ok(());
        }
        let manifest = inner.manifest.in_state(state);
        inner.store.put_manifest(&manifest)?;
        inner.manifest = manifest;
        Ok(())
    }

    /// The guest stays: what was known of it before holds. A guest in doubt was only taken because that destination does
    /// not run it; one that runs elsewhere still does.
    ///
    /// # Errors
    /// As [`mark`](Self::mark).
    pub fn keep(&self) -> Result<(), StoreError> {
        self.mark(self.before)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_guest_that_stays_is_what_it_was() {
        let dir = tempfile::tempdir().unwrap();
        for (before, after) in [
            (State::Whole, State::Whole),
            (State::Sent, State::Sent),
            (State::Incomplete, State::Incomplete),
            (State::InDoubt, State::Whole),
            (State::Sending, State::Whole),
        ] {
            let store = Store::open(dir.path()).unwrap();
            let manifest = super::super::tests::manifest(before);
            store.put_manifest(&manifest).unwrap();
            let custody = Custody::new(store, manifest);
            custody.mark(State::Sending).unwrap();
            custody.keep().unwrap();
            drop(custody);
            let store = Store::open(dir.path()).unwrap();
            assert_eq!(store.manifest().unwrap().unwrap().state, after, "{before}");
        }
    }

    /// Sent once more, in doubt or killed on its way, and sent again with an override, which fails.
    #[test]
    fn a_doubt_about_the_last_destination_hides_nothing_of_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        for before in [State::Whole, State::Sent, State::Incomplete] {
            for open in [State::Sending, State::InDoubt] {
                let store = Store::open(dir.path()).unwrap();
                store.put_manifest(&super::super::tests::manifest(before)).unwrap();
                drop(store);
                for end in [None, None, Some(before)] {
                    let store = Store::open(dir.path()).unwrap();
                    let manifest = store.manifest().unwrap().unwrap();
                    let custody = Custody::new(store, manifest);
                    custody.mark(State::Sending).unwrap();
                    custody.mark(open).unwrap();
                    end.inspect(|_| custody.keep().unwrap());
                    drop(custody);
                    let found = Store::open(dir.path()).unwrap().manifest().unwrap().unwrap();
                    assert_eq!(found.state, end.unwrap_or(open), "{before}");
                    assert_eq!(found.unless_given(), before, "{open}");
                    assert_eq!(found.otherwise.is_some(), end.is_none() && before != State::Whole);
                }
            }
        }
    }
}
