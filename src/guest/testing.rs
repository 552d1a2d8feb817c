//! A machine for tests.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};

use super::{DeviceState, GuestControl};
use crate::sys::Lock as _;

/// A machine without a vCPU: it knows whether it runs, and its device state is a string of bytes. Clones are one machine.
#[derive(Clone, Debug, Default)]
pub struct TestMachine(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    runs: bool,
    state: Vec<u8>,
    keeps_memory: bool,
}

impl TestMachine {
    /// It runs, and saves `state`. The default stands still and waits for one.
    pub fn running(state: &[u8]) -> Self {
        let machine = Self::default();
        *machine.0.locked() = Inner { runs: true, state: state.to_vec(), keeps_memory: false };
        machine
    }

    /// Promises, when it is asked, that no page is given back to the kernel: a NIC may register its memory.
    #[must_use]
    pub fn keeping_memory(self) -> Self {
        self.0.locked().keeps_memory = true;
        self
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.0.locked().runs
    }

    /// Its device state: what it was made with, or what it has loaded.
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
}
