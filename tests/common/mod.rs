//! Shared code of the integration tests: QEMUs as peers, memory with a known pattern, waits with a time limit.
//!
//! Each test program compiles this module for itself and uses a part of it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

#[cfg(feature = "tls")]
pub(crate) mod certificates;
pub(crate) mod huge_pages;
pub(crate) mod memory;
pub(crate) mod qemu;
pub(crate) mod qmp;
#[cfg(feature = "cli")]
pub(crate) mod ramwire;
pub(crate) mod scribbler;
pub(crate) mod writer;

use std::{
    io::Write,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

/// A point in time after which waiting is a failure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Instant,
    allowed: Duration,
}

impl Deadline {
    /// `allowed` from now on; six times that inside the emulated machine of `ci/rxe-guest`.
    pub(crate) fn after(allowed: Duration) -> Self {
        let allowed = allowed * if in_rxe_guest() { 6 } else { 1 };
        Self { at: Instant::now() + allowed, allowed }
    }

    pub(crate) fn seconds(seconds: u64) -> Self {
        Self::after(Duration::from_secs(seconds))
    }

    pub(crate) fn is_over(&self) -> bool {
        Instant::now() >= self.at
    }

    /// Calls `ready` every 10 ms until it returns a value.
    ///
    /// # Panics
    ///
    /// At the deadline, with `what` and the text of `state`.
    pub(crate) fn poll<T>(
        &self,
        what: &str,
        state: impl Fn() -> String,
        mut ready: impl FnMut() -> Option<T>,
    ) -> T {
        loop {
            if let Some(answer) = ready() {
                return answer;
            }
            assert!(!self.is_over(), "{what}: not within {:?}\n{}", self.allowed, state());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A folder of one test, in memory if the machine has a tmpfs for it, removed when dropped.
pub(crate) fn scratch() -> tempfile::TempDir {
    let prefix = "ramwire-test-";
    tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in("/dev/shm")
        .or_else(|_| tempfile::Builder::new().prefix(prefix).tempdir())
        .expect("no scratch folder")
}

/// Reports that a test is skipped and why, bypassing the capture of test output. A failure where `CI=true`.
///
/// # Panics
///
/// If the environment has `CI=true`.
pub(crate) fn skip(lacks: &str) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "with CI=true nothing may be skipped: {lacks}");
    let test = thread::current().name().unwrap_or("a test").to_owned();
    // Not eprintln!, which the test runner would capture.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {lacks}");
}

/// True inside `ci/rxe-guest`, where rxe0 at [`RXE_ADDRESS`] is a verbs device.
pub(crate) fn in_rxe_guest() -> bool {
    std::env::var_os("RAMWIRE_IN_GUEST").is_some()
}

/// Address of the soft-RoCE device inside `ci/rxe-guest`.
pub(crate) const RXE_ADDRESS: &str = "10.9.0.1";

/// The clone's own folder.
pub(crate) fn project_root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
