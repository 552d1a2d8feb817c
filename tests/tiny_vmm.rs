//! docs/examples/tiny-vmm moves its KVM guest back and forth, and the guest's own check never fails.
#![cfg(all(feature = "kvm", feature = "vm-memory"))]
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// The example's program; `cargo test` builds it beside the tests.
fn tiny_vmm(log: &str, vcpus: &str) -> String {
    let deps = std::env::current_exe().unwrap();
    let program = deps.ancestors().nth(2).unwrap().join("examples/tiny-vmm");
    assert!(program.exists(), "{} is missing: cargo build --example tiny-vmm", program.display());
    let out = Command::new(program)
        .args(["--memory", "12M", "--rate", "30M", "--migrations", "20", "--log", log, "--vcpus", vcpus])
        .output()
        .unwrap();
    let (text, errors) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{log}:\n{text}\n{errors}");
    text
}

/// Every migration is reported with all pages verified, none wrong; and after each the guest went on writing.
fn assert_twenty_whole_arrivals(text: &str) {
    for number in 1..=20 {
        let line = text.lines().find(|line| line.starts_with(&format!("{number}: "))).unwrap_or(text);
        assert!(
            line.contains(" 3072 pages verified, 0 wrong;") && !line.ends_with("; 0 written since"),
            "{line}"
        );
    }
    assert!(text.lines().last().unwrap().ends_with("nothing lost"), "{text}");
}

#[test]
fn twenty_migrations_by_the_dirty_log_lose_nothing() {
    assert_twenty_whole_arrivals(&tiny_vmm("log", "2"));
}

#[test]
fn twenty_migrations_by_dirty_rings_lose_nothing() {
    assert_twenty_whole_arrivals(&tiny_vmm("ring", "3"));
}
