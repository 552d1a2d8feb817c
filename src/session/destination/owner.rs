//! Ownership of the guest after a switch to postcopy, shared by the thread that loads its state and the one that reads
//! the stream.

use std::sync::{Condvar, Mutex, PoisonError};

use crate::engine::Ownership;
use crate::sys::Lock as _;

/// The engine's [`Ownership`], and a wait for its result.
#[derive(Default)]
pub(super) struct Owner {
    known: Mutex<Known>,
    changed: Condvar,
}

#[derive(Default)]
struct Known {
    owner: Ownership,
    /// No thread accepts another connection of the source.
    last_connection: bool,
}

impl Owner {
    /// For a source that waits for no answer, and so has already handed over its guest.
    pub(super) fn here() -> Self {
        let known = Known { owner: Ownership::Here, last_connection: false };
        Self { known: Mutex::new(known), ..Self::default() }
    }

    /// One step of the engine.
    pub(super) fn step<T>(&self, step: impl FnOnce(&mut Ownership) -> T) -> T {
        let answer = step(&mut self.known.locked().owner);
        self.changed.notify_all();
        answer
    }

    pub(super) fn get(&self) -> Ownership {
        self.known.locked().owner
    }

    /// From here on no thread accepts another connection: a wait for its proof ends.
    pub(super) fn is_on_its_last_connection(&self) {
        self.known.locked().last_connection = true;
        self.changed.notify_all();
    }

    /// Waits until ownership is known, or can't become known; true if the guest is owned here.
    pub(super) fn wait_until_known(&self) -> bool {
        let waits = |known: &mut Known| known.owner == Ownership::Unknown && !known.last_connection;
        let known = self.changed.wait_while(self.known.locked(), waits);
        let mut known = known.unwrap_or_else(PoisonError::into_inner);
        known.owner.give_up();
        known.owner == Ownership::Here
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_by_a_proof_by_the_end_and_where_no_proof_can_come() {
        type End = fn(&Owner);
        let ends: [(End, bool); 4] = [
            (|owner| assert!(owner.step(Ownership::proven)), true),
            (|owner| assert!(!owner.step(|owner| owner.lost(false, true))), false),
            (|owner| owner.step(Ownership::give_up), false),
            (Owner::is_on_its_last_connection, false),
        ];
        for (end, here) in ends {
            let owner = Owner::default();
            assert!(owner.step(Ownership::answering) && owner.step(|owner| owner.lost(true, true)));
            std::thread::scope(|scope| {
                let waits = scope.spawn(|| owner.wait_until_known());
                end(&owner);
                assert_eq!(waits.join().unwrap_or(!here), here);
            });
            assert_eq!(owner.step(Ownership::proven), here, "what was decided stays");
        }
    }
}
