//! A guest that arrives without a copy (`--same-host`): its memory is the memory that the demo's process passes, and
//! the guest is made from it once it has arrived.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};

use ramwire::error::Remedy;
use ramwire::guest::{DeviceState, DirtySource, GuestControl, GuestMemory};
use ramwire::session::{Error, Incoming, MemoryProvider};
use ramwire::units::PageSize;

use super::Failure;
use super::guest::{DemoGuest, Found, GuestKind};

const NOT_COME: &str = "the guest's memory has not come";

/// The guest, once its memory has arrived.
#[derive(Clone)]
pub(super) struct Arriving {
    kind: GuestKind,
    guest: Arc<Mutex<Option<Box<dyn DemoGuest>>>>,
}

impl Arriving {
    /// Of this kind.
    pub(super) fn new(kind: GuestKind) -> Self {
        Self { kind, guest: Arc::default() }
    }

    fn with<T>(&self, act: impl FnOnce(&dyn DemoGuest) -> io::Result<T>) -> io::Result<T> {
        let guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        act(&**guest.as_ref().ok_or_else(|| io::Error::other(NOT_COME))?)
    }
}

impl DemoGuest for Arriving {
    fn control(&self) -> Box<dyn GuestControl> {
        Box::new(self.clone())
    }

    fn written(&self) -> Result<Arc<dyn DirtySource>, Failure> {
        let guest = self.guest.lock().unwrap_or_else(PoisonError::into_inner);
        guest.as_ref().ok_or(NOT_COME)?.written()
    }

    fn verify(&self) -> io::Result<Found> {
        self.with(|guest| guest.verify())
    }
}

impl MemoryProvider for Arriving {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        let memory = incoming.map(PageSize::SIZE_4K, |block| {
            Err(Error::Config {
                what: format!("RAM block {} was to come without a copy, and was not passed", block.name),
                remedy: Remedy::Advice("give the guest shared memory, and both processes a UNIX socket"),
            })
        })?;
        let made = self.kind.empty(memory.clone(), false).map_err(|error| Error::Control {
            what: "be made of the memory that came",
            source: io::Error::other(error.to_string()),
        })?;
        *self.guest.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
        Ok(memory)
    }
}

impl GuestControl for Arriving {
    fn pause(&mut self) -> io::Result<()> {
        self.with(|guest| guest.control().pause())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.with(|guest| guest.control().resume())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Arriving {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.with(|guest| devices(&mut *guest.control(), |devices| devices.save(out)))
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        self.with(|guest| devices(&mut *guest.control(), |devices| devices.load(from)))
    }
}

fn devices(
    control: &mut dyn GuestControl,
    act: impl FnOnce(&mut dyn DeviceState) -> io::Result<()>,
) -> io::Result<()> {
    act(control.devices().ok_or_else(|| io::Error::other("the guest has no devices"))?)
}
