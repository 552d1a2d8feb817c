//! The command under test as a process.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use super::Deadline;

/// A running `ramwire`; dropping it kills it.
pub(crate) struct Ramwire {
    child: Child,
    label: String,
    out: PathBuf,
    errors: PathBuf,
}

impl Drop for Ramwire {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ramwire {
    /// Starts the command with `arguments` and `last`; its output goes to files in `dir`.
    ///
    /// The kernel ends it together with the calling thread, so that a killed test leaves no process running.
    pub(crate) fn start(dir: &Path, arguments: &[&str], last: impl AsRef<OsStr>) -> Self {
        Self::start_on(dir, arguments, last, Stdio::null())
    }

    /// The same with another standard input, which the command may have as `fd:0`.
    pub(crate) fn start_on(dir: &Path, arguments: &[&str], last: impl AsRef<OsStr>, input: Stdio) -> Self {
        let label = format!("ramwire {}", arguments.join(" "));
        let unique = format!("{}-{}", arguments[0], fs::read_dir(dir).map_or(0, Iterator::count));
        let (out, errors) = (dir.join(format!("{unique}.out")), dir.join(format!("{unique}.err")));
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(env!("CARGO_BIN_EXE_ramwire"))
            .args(arguments)
            .arg(last)
            .stdin(input)
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&errors).unwrap())
            .spawn()
            .expect("cannot start setpriv (util-linux)");
        Self { child, label, out, errors }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end (SIGTERM).
    pub(crate) fn terminate(&self) {
        let sent = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "{}: no signal", self.label);
    }

    /// The file of its standard output.
    pub(crate) fn output(&self) -> PathBuf {
        self.out.clone()
    }

    /// Its output on standard error.
    pub(crate) fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// The address on which it reports that it listens.
    pub(crate) fn listening(&mut self) -> String {
        let label = self.label.clone();
        let errors = self.errors.clone();
        let read = || fs::read_to_string(&errors).unwrap_or_default();
        Deadline::seconds(20).poll(&format!("{label}: address"), read, || {
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("{label}: ended with {status}\n{}", read());
            }
            let text = read();
            let line = text.lines().find_map(|line| line.strip_prefix("listening on "))?;
            text.contains(&format!("{line}\n")).then(|| line.to_owned())
        })
    }

    fn status(&mut self, deadline: Deadline) -> i32 {
        let label = self.label.clone();
        let errors = self.errors.clone();
        let read = || fs::read_to_string(&errors).unwrap_or_default();
        let status = deadline.poll(&format!("{label}: end"), read, || self.child.try_wait().unwrap());
        status.code().unwrap_or(-1)
    }

    /// Waits for its end with `status` and parses its output as JSON.
    pub(crate) fn finished(&mut self, deadline: Deadline, status: i32) -> Value {
        let found = self.status(deadline);
        let out = fs::read_to_string(&self.out).unwrap();
        let errors = self.errors();
        assert_eq!(found, status, "{}: {out}{errors}", self.label);
        serde_json::from_str(&out).unwrap_or_else(|error| panic!("{}: {error}: {out}{errors}", self.label))
    }

    /// Waits for its end, and returns its status and its output on standard error.
    pub(crate) fn ended(&mut self, deadline: Deadline) -> (i32, String) {
        (self.status(deadline), self.errors())
    }

    /// Waits for its end with `status` and returns its output on standard error.
    pub(crate) fn failed(&mut self, deadline: Deadline, status: i32) -> String {
        let found = self.status(deadline);
        let errors = self.errors();
        assert_eq!(found, status, "{}: {errors}", self.label);
        errors
    }
}
