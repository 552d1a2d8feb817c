//! Keepalives of a busy destination to its source.
//!
//! The work between the last byte and READY takes time: a digest of all RAM, a guest's state, a folder's `fsync`, a
//! relay's far end. The source treats a long silence as a dead peer, and should not wait for hours without a sign.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};

use crate::error::Chain;
use crate::stream::native::Answer;
use crate::stream::qemu::return_path::Message;
use crate::sys::{Lock as _, Stop};

use super::DestinationSession;
use super::return_path::ReturnPathWriter;
use crate::session::workers::Spawner;

/// Longest silence of a destination that is busy.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

/// Sends WORKING to a ramwire source.
pub(super) struct Keepalive {
    interval: Duration,
    /// Threads that sent it, or still do.
    threads: Vec<JoinHandle<()>>,
}

impl Keepalive {
    /// For a source that treats a silence of `stall_timeout` as a dead peer.
    pub(super) fn new(stall_timeout: Duration) -> Self {
        Self { interval: (stall_timeout / 4).min(KEEPALIVE_INTERVAL), threads: Vec::new() }
    }

    #[cfg(test)]
    pub(super) fn every(&mut self, interval: Duration) {
        self.interval = interval;
    }

    /// Sends WORKING on `back`, each time within `patience`, until the value is dropped.
    fn begin(&mut self, back: ReturnPathWriter, spawner: &Spawner, patience: Duration) -> Speaking {
        let back = Arc::new(Mutex::new(Some(back)));
        let (done, until_done) = bounded::<()>(0);
        let every = self.interval;
        let shared = Arc::clone(&back);
        let say = move || {
            while until_done.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let back = shared.locked();
                let Some(back) = &*back else { return };
                let stop = Stop::never().within(patience);
                if let Err(error) = back.message(Message::Native(Answer::Working), &stop) {
                    // The next message of the session gets the same error, and ends the migration.
                    tracing::warn!(error = %Chain(&error), "a keepalive could not be sent to the source");
                    return;
                }
            }
        };
        let thread = spawner.spawn("ramwire-working", Box::new(say));
        if let Err(error) = &thread {
            tracing::warn!(%error, "no keepalives are sent to the source; it may give this end up");
        }
        self.threads.extend(thread.ok());
        Speaking { back, _done: done }
    }

    /// Waits for the threads: no thread of a session remains when it has ended.
    pub(super) fn join(&mut self) {
        for thread in self.threads.drain(..) {
            // A panic in the embedder's spawner was already reported.
            let _ = thread.join();
        }
    }
}

/// WORKING is sent while this exists.
struct Speaking {
    back: Arc<Mutex<Option<ReturnPathWriter>>>,
    /// Its end ends the thread.
    _done: Sender<()>,
}

impl Drop for Speaking {
    fn drop(&mut self) {
        // The thread sends nothing from here on. Its end is not awaited: it may not even have begun, and the guest is
        // paused.
        *self.back.locked() = None;
    }
}

impl DestinationSession {
    /// Runs `work`; meanwhile a thread sends WORKING to a ramwire source.
    pub(super) fn with_keepalive<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let tells = self.driver.engine.is_native() && self.reported.return_path;
        let back = self.wire.back.clone().filter(|_| tells);
        let (spawner, patience) = (&self.settings.spawner, self.settings.stall_timeout);
        let _speaking = back.map(|back| self.keepalive.begin(back, spawner, patience));
        work(self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{self, Read};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::session::tests::plain;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// The bytes received on `far`, to its end, before `last`.
    fn in_front_of(mut far: UnixStream, last: Message<'_>) -> Vec<u8> {
        let (mut came, mut end) = (Vec::new(), Vec::new());
        far.read_to_end(&mut came).unwrap();
        last.encode(&mut end);
        came.strip_suffix(&end[..]).unwrap().to_vec()
    }

    #[test]
    fn it_speaks_again_and_again_and_not_behind_its_end() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let back = ReturnPathWriter::new(plain(&near));
        drop(near);
        let mut keepalive = Keepalive::new(PATIENCE);
        keepalive.every(Duration::from_millis(1));
        let speaking = keepalive.begin(back.clone(), &Spawner::default(), PATIENCE);
        let mut word = Vec::new();
        Message::Native(Answer::Working).encode(&mut word);
        let mut first = vec![0; 3 * word.len()];
        far.read_exact(&mut first).unwrap();
        assert_eq!(first, word.repeat(3));
        drop(speaking);
        back.message(Message::Pong(1), &Stop::never()).unwrap();
        keepalive.join();
        drop(back);
        let rest = in_front_of(far, Message::Pong(1));
        assert_eq!(rest, word.repeat(rest.len() / word.len()), "whole words, and none behind the answer");
    }

    #[test]
    fn work_that_is_short_or_without_a_thread_says_nothing() {
        for spawner in [Spawner::default(), Spawner::new(|_, _| Err(io::Error::other("no")))] {
            let (near, far) = UnixStream::pair().unwrap();
            let back = ReturnPathWriter::new(plain(&near));
            drop(near);
            let mut keepalive = Keepalive::new(PATIENCE);
            keepalive.every(Duration::MAX);
            drop(keepalive.begin(back.clone(), &spawner, PATIENCE));
            back.message(Message::Pong(1), &Stop::never()).unwrap();
            keepalive.join();
            drop(back);
            assert_eq!(in_front_of(far, Message::Pong(1)), b"");
        }
    }
}
