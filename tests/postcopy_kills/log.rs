//! What both ends write down as it happens: whole lines of one file, in the order in which they were written.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;

use ramwire::guest::synthetic::SyntheticGuest;
use ramwire::guest::{DeviceState, GuestControl};

#[derive(Debug)]
pub(crate) struct Log(File);

impl Log {
    pub(crate) fn of(dir: &Path) -> Self {
        Self(OpenOptions::new().create(true).append(true).open(dir.join("log")).unwrap())
    }

    pub(crate) fn line(&self, text: &str) {
        (&self.0).write_all(format!("{}\n", text.replace('\n', " ")).as_bytes()).unwrap();
    }
}

/// A guest of which is written down when it runs: before it begins to, and once it has ceased.
pub(crate) struct Recorded {
    pub(crate) guest: SyntheticGuest,
    pub(crate) end: &'static str,
    pub(crate) log: Log,
}

impl GuestControl for Recorded {
    fn pause(&mut self) -> io::Result<()> {
        self.guest.pause()?;
        self.log.line(&format!("{} stands", self.end));
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.log.line(&format!("{} runs", self.end));
        self.guest.resume()
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        self.guest.devices()
    }
}
