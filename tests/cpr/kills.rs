//! Processes that are killed while the memory of a folder's guest is passed; and a place that takes no memory.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde_json::json;

use super::common::{
    Deadline,
    memory::MIB,
    qemu::{Qemu, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use super::{assert_no_page_sent, channels, filled, giving, guest, maps, ram_file, taken, uri, waiting};

/// Bytes of a stream that has only begun: magic and version. A QEMU that finds fewer before the end looks for more for ever.
const BEGUN: usize = 8;

/// Which process is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Killed {
    Nobody,
    Ramwire,
    Qemu,
}

/// Carries the main channel from a ramwire to a QEMU. Once so many bytes have passed nothing comes back any more, and a
/// process is killed. Returns how many bytes have passed.
fn carried(
    (at, to): (&Path, &Path),
    limit: usize,
    victim: impl FnOnce() + Send + 'static,
) -> JoinHandle<usize> {
    let listener = UnixListener::bind(at).unwrap();
    let to = to.to_owned();
    std::thread::spawn(move || {
        let (mut near, _) = listener.accept().unwrap();
        let mut far = UnixStream::connect(to).unwrap();
        let is_cut = Arc::new(AtomicBool::new(false));
        let (mut answers, mut back) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        let cut = Arc::clone(&is_cut);
        // Ends with the QEMU.
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(got @ 1..) = answers.read(&mut buffer) {
                if !cut.load(Ordering::SeqCst) && back.write_all(&buffer[..got]).is_err() {
                    break;
                }
            }
            let _ = back.shutdown(Shutdown::Both);
        });
        let (mut passed, mut buffer) = (0, vec![0; 1 << 16]);
        while passed < limit {
            let room = buffer.len().min(limit - passed);
            let Ok(got @ 1..) = near.read(&mut buffer[..room]) else { break };
            passed += got;
            is_cut.store(passed == limit, Ordering::SeqCst);
            if far.write_all(&buffer[..got]).is_err() {
                break;
            }
        }
        if passed == limit {
            victim();
        }
        let _ = far.shutdown(Shutdown::Write);
        passed
    })
}

fn kill(pid: u32) {
    assert!(Command::new("kill").args(["-KILL", &pid.to_string()]).status().unwrap().success());
}

/// True once the QEMU has the guest, false once it has ended without.
fn has_taken(qemu: &mut Qemu) -> bool {
    let deadline = Deadline::seconds(60);
    loop {
        match qemu.try_execute("query-migrate", json!({})) {
            Ok(info) if info["status"] == "completed" => return true,
            Ok(info) if info["status"] == "failed" => return false,
            Ok(_) => {}
            Err(_) => return false,
        }
        assert!(!deadline.is_over(), "{}", qemu.stderr());
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

fn copied(from: &Path, to: &Path) {
    fs::create_dir_all(to.join("guest")).unwrap();
    fs::set_permissions(to.join("guest"), fs::metadata(from).unwrap().permissions()).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join("guest").join(entry.file_name())).unwrap();
    }
}

/// Gives the folder of `dir` to a QEMU, and kills a process after so many bytes of the migration. Returns how many bytes
/// passed, whether the QEMU has the guest, and how the ramwire ended.
fn given_and_killed(dir: &Path, killed: Killed, limit: usize) -> (usize, bool, (i32, String)) {
    let version = Version::Newest;
    let places = channels(dir, "next");
    let through = [dir.join("through.main"), places[1].clone()];
    let mut ramwire = giving(dir, &through, &[]);
    let mut next = waiting(guest(version, dir), &places).start(dir, "next");
    let (giver, taker) = (ramwire.pid(), next.pid());
    let carried = carried((&through[0], &places[0]), limit, move || match killed {
        Killed::Nobody => {}
        Killed::Ramwire => kill(giver),
        Killed::Qemu => kill(taker),
    });
    let ended = ramwire.ended(Deadline::seconds(60));
    let passed = carried.join().unwrap();
    let taken = killed != Killed::Qemu && has_taken(&mut next);
    (passed, taken, ended)
}

/// Either process is killed at one point of the hand-over after the other: the guest is whole in the folder unless the
/// QEMU has it, and it is not given to a second one unless an operator says that the first is dead.
#[test]
fn a_process_that_is_killed_leaves_the_guest_at_one_side() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let dir = dir.path();
    let mut qemu = guest(Version::Newest, dir).start(dir, "source");
    let pattern = filled(&qemu, dir);
    let out = taken(&mut qemu, dir);
    drop(qemu);
    let whole = dir.join("whole");
    copied(&dir.join("guest"), &whole);
    let (all, taken, ended) = given_and_killed(&whole, Killed::Nobody, usize::MAX);
    assert!(taken && ended.0 == 0, "{ended:?}");
    for killed in [Killed::Ramwire, Killed::Qemu] {
        // Behind the device state, in which the guest is given away, comes its description, which may be half of the stream.
        for limit in [BEGUN, all / 8, all / 4, all / 2, all] {
            let here = dir.join(format!("{killed:?}-{limit}"));
            copied(&dir.join("guest"), &here);
            let (passed, taken, (status, text)) = given_and_killed(&here, killed, limit);
            let what = format!("{killed:?} is killed after {limit} of {all} bytes: {status}: {text}");
            assert_eq!(passed, limit, "{what}");
            if killed == Killed::Ramwire && (limit == BEGUN || limit == all) {
                assert_eq!(taken, limit == all, "{what}");
            }
            let places = channels(&here, "again");
            let again = |more: &[&str]| giving(&here, &places, &[more, &["--retry", "0"]].concat());
            let (refusal, text) = again(&[]).ended(Deadline::seconds(60));
            let in_doubt = text.contains("check there first");
            if taken {
                assert!(refusal == 3 && in_doubt, "{what}: {text}");
                continue;
            }
            // A ramwire that ended by itself knows whether it gave the guest away.
            if killed == Killed::Qemu {
                assert_eq!(status, if in_doubt { 5 } else { 3 }, "{what}: {text}");
                assert!(in_doubt || limit < all, "{what}: {text}");
                assert!(!in_doubt || limit > BEGUN, "{what}: {text}");
            }
            let ram = ram_file(&here, &out);
            assert!(fs::read(&ram).unwrap() == pattern, "{what}: the memory has changed");
            let more: &[&str] = if in_doubt { &["--destination-is-dead"] } else { &[] };
            let mut ramwire = giving(&here, &places, more);
            let mut next = waiting(guest(Version::Newest, &here), &places).start(&here, "again");
            assert_no_page_sent(&ramwire.finished(Deadline::seconds(60), 0), Version::Newest);
            next.wait_completed(Deadline::seconds(20));
            assert!(maps(&next, &ram) && fs::read(&ram).unwrap() == pattern, "{what}");
        }
    }
}

/// A file takes no memory: the guest would be gone.
#[test]
fn a_guest_whose_memory_is_passed_goes_into_no_file() {
    let dir = scratch();
    let dir = dir.path();
    let ram = dir.join("ram");
    fs::write(&ram, vec![7; MIB]).unwrap();
    let block = format!("--ram=pc.ram={}", ram.display());
    let file = format!("file:{}", dir.join("stream").display());
    let cpr = uri(&dir.join("nobody.cpr"));
    let cases: [(&str, &[&str], &str); 4] = [
        (&file, &[], "its memory would not be there"),
        ("unix:main", &["--digest"], "cannot be used with"),
        ("unix:main", &["--postcopy"], "cannot be used with"),
        ("unix:main", &["--timeout", "5", "--timeout-action", "postcopy"], "postcopy can't be used with it"),
    ];
    for (to, more, due) in cases {
        let arguments = [&["send", to, "--cpr", &cpr], more].concat();
        let (status, text) = Ramwire::start(dir, &arguments, &block).ended(Deadline::seconds(20));
        assert!(status == 2 && text.contains(due), "{arguments:?}: {status}: {text}");
    }
    assert!(!dir.join("stream").exists());
}
