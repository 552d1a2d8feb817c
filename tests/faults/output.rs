//! The output is closed, full or not read: every status is the usual one, and no migration waits for the output.

use std::fs::File;
use std::io::{PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::command::received;
use crate::common::{Deadline, ramwire::Ramwire, scratch};

/// What takes the output.
#[derive(Clone, Copy, Debug)]
enum Taker {
    Closed,
    Full,
}

impl Taker {
    fn stdio(self) -> Stdio {
        match self {
            // Its reader is closed with this line.
            Self::Closed => std::io::pipe().unwrap().1.into(),
            Self::Full => File::options().write(true).open("/dev/full").unwrap().into(),
        }
    }
}

/// Ends its process when dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn start(arguments: &[&str], out: Stdio, errors: Stdio) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire"));
        command.args(arguments).stdin(Stdio::null()).stdout(out).stderr(errors);
        Self(command.spawn().unwrap())
    }

    fn status(&mut self, what: &str) -> Option<i32> {
        let ended = || self.0.try_wait().unwrap();
        Deadline::seconds(100).poll(what, String::new, ended).code()
    }
}

fn socket(dir: &Path) -> String {
    format!("unix:{}", dir.join("socket").display())
}

#[test]
fn every_status_holds_whatever_becomes_of_the_output() {
    let dir = scratch();
    let (_, folder) = received(dir.path());
    let whole = dir.path().join("stream");
    let stream = format!("file:{}", whole.display());
    Ramwire::start(dir.path(), &["send", &stream, "--json", "--dir"], &folder)
        .finished(Deadline::seconds(60), 0);
    let cut = dir.path().join("cut");
    std::fs::write(&cut, &std::fs::read(&whole).unwrap()[..5000]).unwrap();
    let (whole, cut) = (whole.to_str().unwrap(), cut.to_str().unwrap());
    let to = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let small = ["demo", "--ram", "8M", "--working-set", "1M", "--dirty-rate", "0"];
    for taker in [Taker::Closed, Taker::Full] {
        for json in [None, Some("--json")] {
            let into = to(&format!("into-{taker:?}-{json:?}"));
            for (arguments, status) in [
                (&["devices"][..], 0),
                (&["inspect", whole], 0),
                (&["inspect", cut], 3),
                (&small, 0),
                (&["--log", "trace", "receive", &stream, "--dir", &into], 0),
                (&["--log", "trace", "send", &stream, "--again", "--dir", folder.to_str().unwrap()], 0),
                (&["send", &stream, "--dir", &to("missing")], 3),
            ] {
                let arguments: Vec<&str> = arguments.iter().copied().chain(json).collect();
                let what = format!("{taker:?}: {arguments:?}");
                let ended = Running::start(&arguments, taker.stdio(), taker.stdio()).status(&what);
                assert_eq!(ended, Some(status), "{what}");
            }
        }
        // A command that runs for its output has failed without it.
        let ended = Running::start(&["generate", "man"], taker.stdio(), taker.stdio()).status("generate");
        assert_eq!(ended, Some(3), "{taker:?}");
    }
}

/// A pipe that accepts no more bytes, and the end that keeps it open.
fn clogged() -> (PipeWriter, std::io::PipeReader) {
    let (reader, mut writer) = std::io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    (writer, reader)
}

#[test]
fn a_log_that_nobody_reads_holds_no_migration_up() {
    let dir = scratch();
    let (_, folder) = received(dir.path());
    let ((errors, _unread), uri) = (clogged(), socket(dir.path()));
    let errors = || errors.try_clone().unwrap().into();
    let next: PathBuf = dir.path().join("next");
    let log = ["--log", "trace"];
    let into = next.to_str().unwrap();
    let mut receiver =
        Running::start(&[&log[..], &["receive", &uri, "--dir", into]].concat(), Stdio::null(), errors());
    let path = dir.path().join("socket");
    Deadline::seconds(60).poll("it listens", String::new, || path.exists().then_some(()));
    let from = folder.to_str().unwrap();
    let mut sender =
        Running::start(&[&log[..], &["send", &uri, "--dir", from]].concat(), Stdio::null(), errors());
    assert_eq!((sender.status("send"), receiver.status("receive")), (Some(0), Some(0)));
}
