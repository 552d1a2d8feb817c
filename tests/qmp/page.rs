//! Runs the example of docs/qmp.md as it is printed there.

use std::process::{Command, Output};

use super::Bed;
use super::common::{
    Deadline,
    memory::compare,
    project_root,
    qemu::{Version, peers_present},
};

#[test]
fn the_example_of_the_page_moves_a_guest() {
    if !peers_present() {
        return;
    }
    let page = std::fs::read_to_string(project_root().join("docs/qmp.md")).unwrap();
    let (_, rest) = page.split_once("```sh\n").unwrap();
    let (script, _) = rest.split_once("```").unwrap();
    let bed = Bed::new();
    let (mut destination, uri) = bed.waiting(Version::Qemu100, &["multifd"]);
    let program = std::path::Path::new(env!("CARGO_BIN_EXE_ramwire")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let mut shell = Command::new("timeout");
    shell.args(["120", "sh", "-eu", "-c", script]).current_dir(bed.path()).env("PATH", path).env("URI", &uri);
    let Output { status, stdout, stderr } = shell.output().unwrap();
    let (out, errors) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    println!("{out}{errors}");
    assert!(status.success(), "{status}\n{out}{errors}");
    assert!(!out.contains("\"error\"") && out.contains("completed"), "{out}{errors}");
    destination.wait_completed(Deadline::seconds(20));
    compare(&bed.ram, &destination.ram).unwrap();
}
