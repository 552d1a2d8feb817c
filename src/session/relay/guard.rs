//! Protection of a guest in doubt if the relay dies.

use std::io;
use std::os::fd::BorrowedFd;

/// The connections of a relay that is about to hand over its guest.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Held<'a> {
    /// To the guest's source, which waits for the outcome.
    pub source: BorrowedFd<'a>,
    /// The source is a ramwire, otherwise a QEMU.
    pub source_is_native: bool,
    /// The source's connection is encrypted by this process: nothing can be told on it by another one. It is held open, and
    /// only its end frees the source.
    pub source_is_encrypted: bool,
    /// To the far end, from which its answer comes; `None` if another process could not read it: by RDMA or TLS.
    pub far_end: Option<BorrowedFd<'a>>,
    /// The far end is a ramwire, otherwise a QEMU.
    pub far_end_is_native: bool,
    /// The source has switched to postcopy: what the guest misses at the far end is only at the source.
    pub switched: bool,
    /// From the source, on which nothing has come: one of them is its connection for urgent pages (QEMU:
    /// postcopy-preempt), and the end of that one counts for the source as the end of `source` does. None without a switch.
    pub urgent: &'a [BorrowedFd<'a>],
}

/// Holds a source's connection while its guest may run at the far end, even if the relay's process dies.
///
/// A QEMU that has handed over its guest and whose connection closes without an answer resumes the guest. If a relay
/// dies between COMMIT and the far end's answer, that guest may then run twice. So another process must keep the
/// connections open by then. It receives duplicates of the descriptors (they can be sent over a UNIX socket), and keeps
/// them until the far end answers, the source has disconnected, or an operator has decided.
pub trait Guard: Send {
    /// The guest is handed over when this returns. It must not take long: the guest is paused.
    ///
    /// # Errors
    /// The connection can't be held: the migration fails and the guest stays at its source.
    fn hold(&mut self, held: &Held<'_>) -> io::Result<()>;

    /// The source has received the outcome, or has disconnected: the connection need not be held any more.
    fn release(&mut self);
}
