//! RAM files that change while a guest is sent from them or received into them: the result is an error, never death by
//! a signal.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use crate::command::received;
use crate::common::{
    Deadline,
    memory::{Pattern, fill},
    project_root,
    ramwire::Ramwire,
    scratch,
};

/// Random pages, so that each has to be sent, and at this rate that takes minutes.
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
    logged(&sender, "action=Send\n");
    File::options().write(true).open(&ram).unwrap().set_len(8192).unwrap();
    let text = sender.failed(Deadline::seconds(60), 3);
    assert!(text.contains("RAM block m0 has lost memory"), "{text}");
    receiver.failed(Deadline::seconds(60), 3);
}

/// A `receive` into `folder` whose first page has arrived, and its slow `send`.
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
    // On a disk, where pages are written through the mapping, and in memory, where they are written through the file.
    let on_disk = tempfile::tempdir_in(project_root().join("target")).unwrap();
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
    // A stream that stops in the middle until the file was replaced.
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
        // In units of 512 or 1024 bytes, depending on the shell: less than the guest's 2 MiB in both.
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

/// Runs `receive` into `folder` from files of RAM; returns the output of both, and the receiver's status.
fn moved(dir: &Path, files: &[&Path], folder: &Path, status: i32) -> (String, String) {
    let mut receiver = Ramwire::start(dir, &["receive", "tcp:127.0.0.1:0", "--dir"], folder);
    let uri = receiver.listening();
    let blocks: Vec<String> =
        files.iter().enumerate().map(|(i, f)| format!("m{i}={}", f.display())).collect();
    let mut arguments = vec!["send", &*uri];
    blocks.iter().for_each(|block| arguments.extend(["--ram", &**block]));
    let last = arguments.pop().unwrap();
    let (sent, errors) = Ramwire::start(dir, &arguments, last).ended(Deadline::seconds(60));
    assert_eq!(sent, status, "{errors}");
    (errors, receiver.failed(Deadline::seconds(60), status))
}

#[test]
fn a_guest_that_finds_no_room_is_refused_before_its_first_page_and_leaves_nothing() {
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    File::create(&ram).unwrap().set_len(1 << 40).unwrap();
    let (sender, receiver) = moved(dir.path(), &[&ram], &folder, 3);
    for text in [sender, receiver] {
        assert!(text.contains("has 1.00 TiB of RAM") && text.contains("more room"), "{text}");
    }
    let left: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["lock"]);
    let mut demo = Ramwire::start(dir.path(), &["demo", "--ram"], "64T");
    let text = demo.failed(Deadline::seconds(60), 3);
    assert!(text.contains("two copies of the guest need 96.00 TiB"), "{text}");
    let mut demo = Ramwire::start(dir.path(), &["demo", "--json", "--ram"], "16M");
    demo.finished(Deadline::seconds(120), 0);
    let text = demo.errors();
    assert!(text.contains("two copies of the guest need 24.00 MiB of memory, and "), "{text}");
}

#[test]
fn a_guest_that_does_not_arrive_leaves_no_ram_behind() {
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 4, Pattern::Random { seed: 3 });
    let (mut receiver, sender) = arriving(dir.path(), &ram, &folder);
    drop(sender);
    receiver.failed(Deadline::seconds(60), 3);
    assert!(!folder.join("ram-000.bin").exists() && !folder.join("manifest.json").exists());
}

#[test]
fn a_mostly_empty_guest_takes_the_room_of_its_pages_alone() {
    let on_disk = tempfile::tempdir_in(project_root().join("target")).unwrap();
    let in_memory = scratch();
    for dir in [on_disk.path(), in_memory.path()] {
        let (ram, folder) = (dir.join("ram"), dir.join("guest"));
        fill(&ram, 1, Pattern::Random { seed: 3 });
        File::options().write(true).open(&ram).unwrap().set_len(64 << 20).unwrap();
        moved(dir, &[&ram], &folder, 0);
        let meta = fs::metadata(folder.join("ram-000.bin")).unwrap();
        let taken = std::os::unix::fs::MetadataExt::blocks(&meta) * 512;
        assert_eq!(meta.len(), 64 << 20);
        assert!((1 << 20..2 << 20).contains(&taken), "{taken} bytes of {}", dir.display());
        crate::common::memory::compare(&ram, &folder.join("ram-000.bin")).unwrap();
    }
}

/// A file system without reservations, in a namespace of its own.
#[test]
fn a_file_system_without_fallocate_takes_a_guest() {
    let dir = scratch();
    let (stream, disk) = (dir.path().join("stream"), dir.path().join("disk"));
    let (ram, errors) = (dir.path().join("ram"), dir.path().join("errors"));
    fill(&ram, 2, Pattern::Random { seed: 1 });
    fs::create_dir(&disk).unwrap();
    let (to, block) = (format!("file:{}", stream.display()), format!("m0={}", ram.display()));
    Ramwire::start(dir.path(), &["send", &to, "--json", "--ram"], &block).finished(Deadline::seconds(60), 0);
    let script = "mount -t ramfs none \"$1\" && \"$2\" receive \"$3\" --dir \"$1/guest\" 2> \"$4\" \
                  && cmp \"$1/guest/ram-000.bin\" \"$5\"";
    let alone: &[&str] = match rustix::process::geteuid().is_root() {
        true => &["--mount"],
        false => &["--user", "--map-root-user", "--mount"],
    };
    let ended = Command::new("unshare")
        .args(alone)
        .args(["sh", "-c", script, "sh"])
        .arg(&disk)
        .arg(env!("CARGO_BIN_EXE_ramwire"))
        .arg(&to)
        .args([&errors, &ram])
        .output()
        .expect("cannot start unshare (util-linux)");
    let said = fs::read_to_string(&errors).unwrap_or_default();
    assert!(ended.status.success(), "{said}{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn many_blocks_need_no_descriptor_each() {
    let dir = scratch();
    let files: Vec<_> = (0..200).map(|index| dir.path().join(format!("block{index}"))).collect();
    files.iter().for_each(|file| fs::write(file, [7; 4096]).unwrap());
    let stream = dir.path().join("stream");
    let to = format!("file:{}", stream.display());
    let mut send = vec!["send".to_owned(), to.clone()];
    for (index, file) in files.iter().enumerate() {
        send.extend(["--ram".to_owned(), format!("m{index}={}", file.display())]);
    }
    let on = ["send", &to, "--again", "--dir", "guest"].map(str::to_owned).to_vec();
    for arguments in [send, ["receive", &to, "--dir", "guest"].map(str::to_owned).to_vec(), on] {
        let ended = Command::new("sh")
            .args(["-c", "ulimit -n 64; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_ramwire")])
            .args(&arguments)
            .current_dir(dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert_eq!(ended.status.code(), Some(0), "{}: {text}", arguments[0]);
    }
}
