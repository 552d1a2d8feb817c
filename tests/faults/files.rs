//! RAM files that change while a guest is sent from them or arrives in them: an error, and never a signal's death.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use crate::command::received;
use crate::common::{
    Deadline,
    memory::{Pattern, fill},
    ramwire::Ramwire,
    scratch,
};

/// Random pages, so that each has to travel, and at this rate takes minutes.
const SLOW: [&str; 2] = ["--max-bandwidth", "40K"];

fn logged(process: &Ramwire, text: &str) {
    let found = || process.errors().contains(text).then_some(());
    Deadline::seconds(60).poll(text, || process.errors(), found);
}

#[test]
fn a_ram_file_that_gets_shorter_while_it_is_sent_ends_the_migration_and_no_process() {
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 4, Pattern::Random { seed: 3 });
    let listen = ["receive", "tcp:127.0.0.1:0", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &listen, &folder);
    let uri = receiver.listening();
    let block = format!("m0={}", ram.display());
    let send = [&["--log", "trace", "send", &uri], &SLOW[..], &["--ram"]].concat();
    let mut sender = Ramwire::start(dir.path(), &send, &block);
    logged(&sender, "action=Send {");
    File::options().write(true).open(&ram).unwrap().set_len(8192).unwrap();
    let text = sender.failed(Deadline::seconds(60), 3);
    assert!(text.contains("RAM block m0 has lost memory"), "{text}");
    receiver.failed(Deadline::seconds(60), 3);
}

/// A `receive` into `folder` whose first page has come, and its slow `send`.
fn arriving(dir: &Path, ram: &Path, folder: &Path) -> (Ramwire, Ramwire) {
    let listen = ["--log", "trace", "receive", "tcp:127.0.0.1:0", "--dir"];
    let mut receiver = Ramwire::start(dir, &listen, folder);
    let uri = receiver.listening();
    let block = format!("m0={}", ram.display());
    let sender = Ramwire::start(dir, &[&["send", &uri], &SLOW[..], &["--ram"]].concat(), block);
    let file = folder.join("ram-000.bin");
    let came = || fs::read(&file).ok()?.iter().any(|byte| *byte != 0).then_some(());
    Deadline::seconds(60).poll("the first page", || receiver.errors(), came);
    (receiver, sender)
}

#[test]
fn a_ram_file_that_gets_shorter_while_its_guest_arrives_refuses_the_guest() {
    // On a disk, whose pages come through the mapping, and in memory, where they come by the file.
    let on_disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let in_memory = scratch();
    for dir in [on_disk.path(), in_memory.path()] {
        let (ram, folder) = (dir.join("ram"), dir.join("guest"));
        fill(&ram, 4, Pattern::Random { seed: 3 });
        let (mut receiver, mut sender) = arriving(dir, &ram, &folder);
        File::options().write(true).open(folder.join("ram-000.bin")).unwrap().set_len(0).unwrap();
        let text = receiver.failed(Deadline::seconds(60), 3);
        assert!(text.contains("RAM block m0 has lost memory"), "{text}");
        sender.failed(Deadline::seconds(60), 3);
    }
}

#[test]
fn a_ram_file_that_is_replaced_while_its_guest_arrives_refuses_the_guest() {
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 4, Pattern::Random { seed: 3 });
    let stream = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &stream, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let written = dir.path().join("stream");
    let block = format!("m0={}", ram.display());
    let uri = format!("file:{}", written.display());
    Ramwire::start(dir.path(), &["send", &uri, "--json", "--ram"], &block).finished(Deadline::seconds(60), 0);
    // A stream that stands still in the middle until the file was replaced.
    let bytes = fs::read(&written).unwrap();
    let uri = format!("exec:cat {}", stream.display());
    let mut receiver = Ramwire::start(dir.path(), &["receive", &uri, "--dir"], &folder);
    let mut pipe = File::options().write(true).open(&stream).unwrap();
    std::io::Write::write_all(&mut pipe, &bytes[..bytes.len() / 2]).unwrap();
    let file = folder.join("ram-000.bin");
    let made = || (fs::metadata(&file).ok()?.len() == 4 << 20).then_some(());
    Deadline::seconds(60).poll("the file", || receiver.errors(), made);
    let other = dir.path().join("other");
    fs::copy(&file, &other).unwrap();
    fs::rename(&other, &file).unwrap();
    std::io::Write::write_all(&mut pipe, &bytes[bytes.len() / 2..]).unwrap();
    drop(pipe);
    let text = receiver.failed(Deadline::seconds(60), 3);
    assert!(text.contains("ram-000.bin was replaced while the guest arrived"), "{text}");
}

#[test]
fn a_limit_of_file_sizes_is_an_error_with_its_remedy() {
    let dir = scratch();
    let (_, folder) = received(dir.path());
    let stream = dir.path().join("stream");
    let to = format!("file:{}", stream.display());
    Ramwire::start(dir.path(), &["send", &to, "--json", "--dir"], &folder).finished(Deadline::seconds(60), 0);
    for arguments in
        [&["receive", &to, "--dir", "into"][..], &["send", "file:other", "--again", "--dir", "guest"]]
    {
        // In units of 512 or 1024 bytes, as the shell has it: less than the guest's 2 MiB in any.
        let ended = Command::new("sh")
            .args(["-c", "ulimit -f 1024; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ramwire")])
            .args(arguments)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(3), "{arguments:?}: {text}");
        assert!(text.contains("ulimit -f"), "{arguments:?}: {text}");
    }
}
