//! The VM besides its memory: [`GuestControl`] pauses and resumes it, [`DeviceState`] saves and loads it.

use std::io::{self, Read, Write};

use crate::observe::named;
use crate::units::{Percent, RestShare};

/// Controls vCPUs and devices; implemented by the VMM.
pub trait GuestControl: Send {
    /// Stops all vCPUs and every device that writes guest RAM; returns when none of them writes any more.
    ///
    /// # Errors
    /// The VMM's own error; the migration then fails and the guest continues.
    fn pause(&mut self) -> io::Result<()>;

    /// Lets the guest run (again). On the destination: for the first time.
    ///
    /// # Errors
    /// The VMM's own error.
    fn resume(&mut self) -> io::Result<()>;

    /// The state of vCPUs and devices: usually `Some(self)`. `None` if there is none: then no device state is sent, and
    /// a destination refuses a guest that has some.
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        None
    }

    /// Takes `share` of all vCPUs' time; 0 ends the throttling. A VMM that does not implement this has no auto-converge
    /// throttling.
    fn throttle(&mut self, _share: Percent) {}

    /// Number of pages that each vCPU has written so far; it only grows. A page counts each time it was found dirty.
    /// Empty if the VMM can't determine which vCPU wrote a page (KVM's dirty rings can): such a guest has no dirty
    /// limit.
    fn vcpu_dirty_pages(&mut self) -> Vec<u64> {
        Vec::new()
    }

    /// Makes vCPU number `vcpu` of [`vcpu_dirty_pages`](Self::vcpu_dirty_pages) rest for a share of the time that it
    /// runs, in addition to [`throttle`](Self::throttle); 0 ends the rests.
    fn throttle_vcpu(&mut self, _vcpu: usize, _rest: RestShare) {}

    /// Promises (or no longer promises) that no page is freed meanwhile. `false` if the guest can't promise this: then
    /// no NIC may register its memory.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        false
    }
}

/// The state of vCPUs and devices: everything of a guest except its RAM.
///
/// A VM that is only a source implements [`save`](Self::save), one that is only a destination [`load`](Self::load). The
/// default of the other returns an error, which ends the migration before COMMIT.
pub trait DeviceState {
    /// Approximate number of bytes that [`save`](Self::save) will write: they count against the downtime limit. The
    /// guest runs.
    fn size(&mut self) -> u64 {
        0
    }

    /// Writes the state; the guest is paused. Called again, with the guest paused again, if the connection was lost and the
    /// guest ran on meanwhile.
    ///
    /// # Errors
    /// An error of the VMM or of the writer.
    fn save(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this machine can't save its device state"))
    }

    /// Reads what [`save`](Self::save) wrote on the other host; the guest does not run yet.
    ///
    /// # Errors
    /// An error of the VMM or of the reader; the destination then refuses the guest.
    fn load(&mut self, _from: &mut dyn Read) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this machine can't load a device state"))
    }

    /// True if [`load`](Self::load) may be called again with another state, as long as the guest has not run: after a
    /// connection that was lost between the two. `false`: such a loss ends the migration.
    fn loads_again(&self) -> bool {
        false
    }
}

/// [`DeviceState::size`] of what `control` has.
pub(crate) fn state_size(control: &mut dyn GuestControl) -> u64 {
    named("calling DeviceState::size", || control.devices().map_or(0, DeviceState::size))
}

/// [`DeviceState::save`] for the device state of `control`: no bytes if there is none.
pub(crate) fn save_state(control: &mut dyn GuestControl) -> io::Result<Vec<u8>> {
    let mut state = Vec::new();
    named("calling DeviceState::save", || {
        control.devices().map_or(Ok(()), |devices| devices.save(&mut state))
    })?;
    Ok(state)
}

/// [`DeviceState::load`] into what `control` has.
pub(crate) fn load_state(control: &mut dyn GuestControl, mut state: &[u8]) -> io::Result<()> {
    match control.devices() {
        Some(devices) => named("calling DeviceState::load", || devices.load(&mut state)),
        None if state.is_empty() => Ok(()),
        None => {
            let text = format!("{} bytes of device state came for a machine without devices", state.len());
            Err(io::Error::new(io::ErrorKind::InvalidData, text))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    struct Bare;

    impl GuestControl for Bare {
        fn pause(&mut self) -> io::Result<()> {
            Ok(())
        }
        fn resume(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// It only leaves.
    struct Leaves(Bare);

    impl GuestControl for Leaves {
        fn pause(&mut self) -> io::Result<()> {
            self.0.pause()
        }
        fn resume(&mut self) -> io::Result<()> {
            self.0.resume()
        }
        fn devices(&mut self) -> Option<&mut dyn DeviceState> {
            Some(self)
        }
    }

    impl DeviceState for Leaves {
        fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
            out.write_all(b"state")
        }
    }

    #[test]
    fn a_machine_without_devices_sends_no_state_and_refuses_one() {
        assert_eq!((state_size(&mut Bare), save_state(&mut Bare).unwrap()), (0, Vec::new()));
        load_state(&mut Bare, b"").unwrap();
        let refused = load_state(&mut Bare, b"state").unwrap_err();
        assert!(refused.to_string().starts_with("5 bytes of device state"), "{refused}");
    }

    #[test]
    fn a_machine_that_only_leaves_refuses_to_load() {
        let mut leaves = Leaves(Bare);
        assert_eq!(save_state(&mut leaves).unwrap(), b"state");
        assert_eq!(load_state(&mut leaves, b"state").unwrap_err().kind(), io::ErrorKind::Unsupported);
    }
}
