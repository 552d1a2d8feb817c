//! Commands of the embedder that wake a session, whatever it waits for.

use std::sync::Mutex;

use crate::sys::{CancelToken, Lock as _};

/// Commands that wait to be taken.
#[derive(Debug)]
pub(super) struct Inbox<T>(Mutex<Waiting<T>>);

#[derive(Debug)]
struct Waiting<T> {
    commands: Vec<T>,
    /// Raised with the first of them.
    wake: CancelToken,
}

impl<T> Default for Inbox<T> {
    fn default() -> Self {
        Self(Mutex::new(Waiting { commands: Vec::new(), wake: CancelToken::default() }))
    }
}

impl<T> Inbox<T> {
    pub(super) fn put(&self, command: T) {
        let mut waiting = self.0.locked();
        waiting.commands.push(command);
        waiting.wake.cancel();
    }

    /// All commands, oldest first.
    pub(super) fn take(&self) -> Vec<T> {
        let mut waiting = self.0.locked();
        if !waiting.commands.is_empty() {
            // A token stays raised.
            waiting.wake = CancelToken::default();
        }
        std::mem::take(&mut waiting.commands)
    }

    /// What the next command raises.
    pub(super) fn wake(&self) -> CancelToken {
        self.0.locked().wake.clone()
    }
}
