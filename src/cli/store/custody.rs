//! The state of a guest in its folder's manifest while the guest is sent.
//!
//! Before the device state is sent the guest is not handed over, and the manifest stays as it was: the process may be
//! killed at any moment. From then on until the result is known its state is `sending`.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Manifest, State, Store, StoreError};

/// The manifest of a guest that is sent. Any thread may mark it.
pub struct Custody {
    before: State,
    inner: Mutex<Inner>,
}

struct Inner {
    store: Store,
    manifest: Manifest,
    /// The RAM files are the destination's memory.
    passes: bool,
}

impl Custody {
    pub(super) fn new(store: Store, manifest: Manifest) -> Self {
        Self { before: manifest.unless_given(), inner: Mutex::new(Inner { store, manifest, passes: false }) }
    }

    /// Writes the new state to the disk.
    ///
    /// # Errors
    /// [`StoreError`]; the old state remains.
    pub fn mark(&self, state: State) -> Result<(), StoreError> {
        let mut inner = self.inner();
        let passed = inner.passes;
        inner.put(state, passed)
    }

    /// The destination maps the RAM files, and the guest changes them once it runs there.
    pub fn pass(&self) {
        self.inner().passes = true;
    }

    /// The guest stays: its previous state is restored. A guest in doubt was sent again only because that destination
    /// does not run it; one that runs elsewhere still does.
    ///
    /// # Errors
    /// As [`mark`](Self::mark).
    pub fn keep(&self) -> Result<(), StoreError> {
        // A guest that has run in the RAM files is not sent again: whoever has them now has not run it.
        self.inner().put(self.before, false)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn put(&mut self, state: State, passed: bool) -> Result<(), StoreError> {
        if self.manifest.state == state && self.manifest.passed == passed {
            return Ok(());
        }
        let manifest = Manifest { passed, ..self.manifest.in_state(state) };
        self.store.put_manifest(&manifest)?;
        self.manifest = manifest;
        Ok(())
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

    /// A guest that runs in the RAM files of its folder has changed them.
    #[test]
    fn a_guest_that_was_passed_is_not_sent_again() {
        for (state, passes) in [(State::Sent, true), (State::InDoubt, true), (State::Sent, false)] {
            let dir = tempfile::tempdir().unwrap();
            let store = Store::open(dir.path()).unwrap();
            let manifest = super::super::tests::manifest(State::Whole);
            store.put_manifest(&manifest).unwrap();
            let custody = Custody::new(store, manifest);
            if passes {
                custody.pass();
            }
            custody.mark(State::Sending).unwrap();
            custody.mark(state).unwrap();
            drop(custody);
            let found = Store::open(dir.path()).unwrap().manifest().unwrap().unwrap();
            assert_eq!((found.state, found.passed), (state, passes));
        }
    }

    /// Sent again while in doubt or after the process was killed, and sent again with an override; the migration fails.
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
