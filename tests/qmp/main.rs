//! The monitor (`--qmp`) of the command, in migrations to real QEMUs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod ctl;
mod page;
mod send;
mod serve;
mod strangers;
mod typed;

use std::path::{Path, PathBuf};

use common::{
    Deadline,
    memory::{Pattern, fill},
    qemu::{Guest, Machine, Qemu, Version},
    qmp::Qmp,
    ramwire::Ramwire,
    scratch,
};
use serde_json::json;

const MACHINE: Machine = Machine::PcI440fx72;
const MIB: usize = 64;

/// A guest in a folder, and its memory contents.
struct Bed {
    dir: tempfile::TempDir,
    ram: PathBuf,
    folder: PathBuf,
}

impl Bed {
    fn new() -> Self {
        let dir = scratch();
        let (ram, folder) = (dir.path().join("sent"), dir.path().join("guest"));
        fill(&ram, MIB, Pattern::Mixed { seed: 23 });
        let mut source = Guest::new(Version::Qemu72, MACHINE, &ram, MIB).start(dir.path(), "stored");
        let mut receiver =
            Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
        source.set_capabilities(&["return-path"]);
        source.set_parameters(json!({"max-bandwidth": 0}));
        source.migrate(&receiver.listening());
        source.wait_completed(Deadline::seconds(120));
        receiver.finished(Deadline::seconds(60), 0);
        source.kill();
        Self { dir, ram, folder }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn socket(&self) -> PathBuf {
        self.path().join("ramwire.qmp")
    }

    /// A QEMU that waits for the guest with these capabilities, and where.
    fn waiting(&self, version: Version, capabilities: &[&str]) -> (Qemu, String) {
        let ram = self.path().join("arrived");
        fill(&ram, MIB, Pattern::Random { seed: 3 });
        let mut waiting =
            Guest::new(version, MACHINE, &ram, MIB).incoming().start(self.path(), "destination");
        waiting.set_capabilities(capabilities);
        if capabilities.contains(&"multifd") {
            waiting.set_parameters(json!({"multifd-channels": 3}));
        }
        let uri = waiting.listen_tcp();
        (waiting, uri)
    }

    /// Sends the guest with a monitor, and connects to that.
    fn send(&self, uri: &str, options: &[&str]) -> (Ramwire, Qmp) {
        let place = format!("unix:{}", self.socket().display());
        let start = ["send", uri, "--json", "--again", "--qmp", &place];
        let mut sender = Ramwire::start(self.path(), &[&start, options, &["--dir"]].concat(), &self.folder);
        let client = connect(&mut sender, &self.socket());
        (sender, client)
    }
}

/// Connects once the monitor is there.
fn connect(ramwire: &mut Ramwire, socket: &Path) -> Qmp {
    Deadline::seconds(20).poll("the monitor", || ramwire.errors(), || Qmp::connect(socket).ok())
}
