//! Locks that stay usable after a thread panicked while it held one.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes locks even if a thread panicked while it held one. A panic ends its own thread and is reported when that
/// thread is joined. The other threads still have to return the guest, and the data under such a lock is consistent
/// after each store.
pub(crate) trait Lock<T: ?Sized> {
    /// Waits for the lock.
    fn locked(&self) -> MutexGuard<'_, T>;
}

impl<T: ?Sized> Lock<T> for Mutex<T> {
    fn locked(&self) -> MutexGuard<'_, T> {
        self.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_thread_that_panicked_held_can_still_be_had() {
        let counted = Mutex::new(1);
        let panicked = std::thread::scope(|scope| {
            let held = scope.spawn(|| {
                *counted.locked() += 1;
                let _held = counted.locked();
                panic!("on purpose");
            });
            held.join().is_err()
        });
        assert!(panicked && counted.is_poisoned());
        assert_eq!(*counted.locked(), 2);
    }
}
