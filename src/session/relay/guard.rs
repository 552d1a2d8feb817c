//! What outlives a relay that dies while its guest is in doubt.

use std::io;
use std::os::fd::BorrowedFd;

/// The connections of a relay that is about to give its guest away.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Held<'a> {
    /// To the guest's source, which waits for what becomes of the guest.
    pub source: BorrowedFd<'a>,
    /// The source is a ramwire, otherwise a QEMU.
    pub source_is_native: bool,
    /// To the far end, where its answer comes from; `None` where that is no descriptor (RDMA).
    pub far_end: Option<BorrowedFd<'a>>,
    /// The far end is a ramwire, otherwise a QEMU.
    pub far_end_is_native: bool,
}

/// Holds a source's connection while its guest may run at the far end, whatever becomes of the process that relays.
///
/// A QEMU that has given its guest away and whose connection closes without an answer lets the guest run again. Should a
/// relay die between COMMIT and the far end's answer, that guest may then run twice. So another process must have the
/// connection open by then: another process that was handed duplicates of the descriptors (they can be sent over a UNIX
/// socket), and that keeps them until the far end answers, the source has gone, or an operator has decided.
pub trait Guard: Send {
    /// The guest is given away when this returns. Must not take long: the guest stands still.
    ///
    /// # Errors
    /// The connection can't be held: the migration fails and the guest stays at its source.
    fn hold(&mut self, held: &Held<'_>) -> io::Result<()>;

    /// The source was told what became of the guest, or has gone: nothing has to be held any more.
    fn release(&mut self);
}
