//! What a demo refuses before it starts: options of its guest or transport, and guests that memory has no room for.

use ramwire::sys::{MappingError, memory_room};
use ramwire::units::PageSize;

use super::super::common::{Usage, human_bytes};
use super::super::output::note;
use super::blocks::BlockSpec;
use super::guest::GuestKind;
use super::way::Transport;
use super::{Args, Failure};

/// Refuses a switch to postcopy where it is not possible.
pub(super) fn refuse_postcopy(args: &Args) -> Result<(), Usage> {
    let why = match () {
        () if args.channels.count() > 0 && args.cut > 0 => {
            "connections that are cut have no page channels: leave --channels out, or --cut"
        }
        () if args.guest != GuestKind::Synthetic => {
            "only the synthetic guest checks its memory while it arrives: leave --guest out, or leave --postcopy out"
        }
        () => return Ok(()),
    };
    Err(Usage(why.into()))
}

/// Refuses cuts of a connection that is not taken up again.
pub(super) fn refuse_cuts(args: &Args) -> Result<(), Usage> {
    let why = match () {
        () if args.transport == Transport::Rdma => {
            "a connection by RDMA that is cut ends the migration: give --transport tcp or unix"
        }
        () => return Ok(()),
    };
    Err(Usage(why.into()))
}

/// The other process needs as many huge pages.
pub(super) fn of_both_ends(args: &Args, error: Failure) -> Failure {
    let twice = error.is::<MappingError>() && args.hugepages > PageSize::SIZE_4K.bytes() && !args.same_host;
    if twice {
        format!("{error}; each of the two ends needs as many: reserve twice that").into()
    } else {
        error
    }
}

/// Both processes have the guest's pages, and of zero pages none unless they are touched ahead.
pub(super) fn check_room(args: &Args, blocks: &[BlockSpec]) -> Result<(), Failure> {
    let total: u64 = blocks.iter().filter(|block| !block.is_reserved()).map(BlockSpec::length).sum();
    let filled = total / 100 * u64::from(100 - args.zero.get());
    if args.same_host {
        // One copy, which this process makes.
        return room_for(filled, "the guest needs");
    }
    let need = filled + if args.populate || args.huge_pages { total } else { filled };
    room_for(need, "two copies of the guest need")
}

fn room_for(need: u64, who: &str) -> Result<(), Failure> {
    let Some(room) = memory_room() else { return Ok(()) };
    let told = format!(
        "{who} {} of memory, and {} are free {}",
        human_bytes(need),
        human_bytes(room.bytes),
        room.bound
    );
    if room.bytes < need {
        return Err(format!("{told}; give a smaller --ram").into());
    }
    note!("ramwire demo: {told}");
    Ok(())
}
