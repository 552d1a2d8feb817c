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
        Self { before: manifest.state, inner: Mutex::new(Inner { store, manifest }) }
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
        let manifest = Manifest { state, ..inner.manifest.clone() };
        inner.store.put_manifest(&manifest)?;
        inner.manifest = manifest;
        Ok(())
    }

    /// The guest stays: what was known of it before holds. A guest in doubt was only taken because its destination does
    /// not run it.
    ///
    /// # Errors
    /// As [`mark`](Self::mark).
    pub fn keep(&self) -> Result<(), StoreError> {
        self.mark(match self.before {
            State::Sending | State::InDoubt => State::Whole,
            before => before,
        })
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
}
