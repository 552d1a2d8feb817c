//! A machine for tests.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};

use super::{DeviceState, GuestControl};
use crate::sys::Lock as _;

/// A VM without a vCPU: it records whether it runs, and its device state is a string of bytes. Clones are the same VM.
#[derive(Clone, Debug, Default)]
pub struct TestMachine(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    runs: bool,
    state: Vec<u8>,
    keeps_memory: bool,
}

impl TestMachine {
    /// A running VM that saves `state`. The default is paused and waits for a state.
    pub fn running(state: &[u8]) -> Self {
        let machine = Self::default();
        *machine.0.locked() = Inner { runs: true, state: state.to_vec(), keeps_memory: false };
        machine
    }

    /// Makes it promise, when requested, that no page is freed: a NIC may register its memory.
    #[must_use]
    pub fn keeping_memory(self) -> Self {
        self.0.locked().keeps_memory = true;
        self
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.0.locked().runs
    }

    /// Its device state: the initial one, or the loaded one.
    pub fn state(&self) -> Vec<u8> {
        self.0.locked().state.clone()
    }
}

impl GuestControl for TestMachine {
    fn pause(&mut self) -> io::Result<()> {
        self.0.locked().runs = false;
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.0.locked().runs = true;
        Ok(())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        self.0.locked().keeps_memory
    }
}

impl DeviceState for TestMachine {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.state())
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut state = Vec::new();
        from.read_to_end(&mut state)?;
        self.0.locked().state = state;
        Ok(())
    }

    /// A later state takes the place of this one.
    fn loads_again(&self) -> bool {
        true
    }
}
