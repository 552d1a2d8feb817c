//! Blocks that both ends map (QEMU's `x-ignore-shared`): they are announced with their address, and none of their pages
//! is sent.

use crate::error::Remedy;
use crate::ram::{BlockName, RamBlock, RamBlockTable};
use crate::stream::qemu::file::{Configuration, IGNORE_SHARED};
use crate::units::GuestAddr;

use crate::session::Error;
use crate::session::destination::Incoming;

/// A source that leaves blocks out announces it: a QEMU compares the capability with its own.
pub(super) fn announce(configuration: &mut Configuration, table: &RamBlockTable) {
    let ignores = table.blocks().iter().any(|block| block.flags.ignored);
    if ignores && !configuration.has(IGNORE_SHARED) {
        configuration.capabilities.push(IGNORE_SHARED.into());
    }
}

/// Blocks that are shared here must be shared at the source, at the same address in the guest.
///
/// # Errors
/// [`Error::Config`], which names the block.
pub(super) fn check(incoming: &Incoming, table: &RamBlockTable) -> Result<(), Error> {
    let announced = |name: &BlockName| incoming.blocks.iter().find(|block| block.name == *name);
    for ours in table.blocks().iter().filter(|block| block.flags.ignored) {
        let name = &ours.name;
        if !incoming.configuration.has(IGNORE_SHARED) {
            return Err(Error::Config {
                what: format!("RAM block {name} is ignored as shared here, and the source sends it"),
                remedy: Remedy::Advice("set x-ignore-shared at both ends or at none"),
            });
        }
        let place = |block: &RamBlock| block.guest_addr.unwrap_or(GuestAddr(0)).0;
        let (theirs, here) = (announced(name).map_or(0, place), place(ours));
        if ours.guest_addr.is_some() && theirs != here {
            return Err(Error::Config {
                what: format!(
                    "RAM block {name} is ignored as shared, and is at {theirs:#x} in the source's guest but at {here:#x} \
                     in this one"
                ),
                remedy: Remedy::Advice("start both ends with the same machine and memory"),
            });
        }
    }
    Ok(())
}

/// A source that leaves out shared blocks needs a destination that has them.
///
/// # Errors
/// [`Error::Config`].
pub(super) fn check_any(incoming: &Incoming, table: &RamBlockTable) -> Result<(), Error> {
    if !incoming.configuration.has(IGNORE_SHARED) || table.blocks().iter().any(|block| block.flags.ignored) {
        return Ok(());
    }
    Err(Error::Config {
        what: "the source leaves shared RAM blocks out (x-ignore-shared), and none is shared here".into(),
        remedy: Remedy::Advice(
            "mark the blocks that both ends map (BlockFlags::ignored), or turn the capability off at the source",
        ),
    })
}
