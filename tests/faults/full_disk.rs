//! A file system that is full while a running guest is written to a file.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::scratch;

/// Runs `script` with `arguments` among mounts of its own, which go with it.
fn alone(script: &str, arguments: &[&Path]) -> Output {
    // Root needs no user namespace, which a container may forbid.
    let user: &[&str] =
        if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    let mut command = Command::new("unshare");
    command.arg("--mount").args(user).args(["sh", "-c", script, "sh"]).args(arguments);
    command.output().expect("cannot start unshare (util-linux)")
}

/// Wherever the file ends, it is no snapshot, the next reader says so, and the guest runs on and is whole.
#[test]
fn a_snapshot_onto_a_full_disk_ends_as_none_and_the_guest_runs_on() {
    let dir = scratch();
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    // The guest has 16 MiB, three quarters of them filled.
    for size in ["64k", "1m", "5m", "11m"] {
        let script = format!(
            r#"mount -t tmpfs -o size={size} none "$1" || exit 9
            "$2" demo --ram 16M --working-set 4M --snapshot "$1/guest.save"
            echo "status $?"
            "$2" inspect "mapped:$1/guest.save"
            echo "inspected $?""#
        );
        let out = alone(&script, &[&disk, Path::new(env!("CARGO_BIN_EXE_ramwire"))]);
        let [text, errors] = [out.stdout, out.stderr].map(|text| String::from_utf8(text).unwrap());
        let told = format!("{size}: {text}{errors}");
        assert!(text.contains("status 3"), "{told}");
        assert!(errors.contains("No space left on device"), "{told}");
        assert!(errors.contains("the guest runs on") && errors.contains("holds no snapshot"), "{told}");
        assert!(text.contains("inspected 3") && !text.contains(", whole"), "{told}");
    }
}
