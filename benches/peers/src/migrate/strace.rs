//! System calls of other processes, counted by strace(1) in a run of its own, so that it does not affect timing.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use super::watch::Watcher;
use crate::BenchError;

/// Longest time until strace is attached to a process.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(20);
/// How a verbs library rings a doorbell by a system call: `IB_USER_VERBS_CMD_POST_SEND` (28) in the first byte of a
/// write(2) to the device (ib_user_verbs.h). Devices with their own doorbells need no call.
const POST_SEND: &str = "\"\\x1c\\x00\\x00\\x00\"";

/// System calls of one process during a migration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Calls {
    /// All of them.
    pub total: u64,
    /// Of these, doorbells of a verbs device: each posts one new chain of requests.
    pub doorbells: u64,
    /// By name.
    pub by_name: BTreeMap<String, u64>,
}

impl Calls {
    /// Parses the output of `strace -f -xx -s 4`.
    fn parse(log: &str) -> Self {
        let mut calls = Self::default();
        for line in log.lines() {
            // `PID name(arguments...`; ends of split calls begin with `<`, signals with `-`, exits with `+`.
            let line = line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
            let Some((name, arguments)) = line.split_once('(') else { continue };
            if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                continue;
            }
            calls.total += 1;
            calls.doorbells += u64::from(name == "write" && arguments.contains(POST_SEND));
            *calls.by_name.entry(name.to_owned()).or_default() += 1;
        }
        calls
    }
}

/// Counts the system calls of two processes while they migrate.
#[derive(Debug)]
pub struct Strace {
    folder: PathBuf,
    running: Vec<(Child, PathBuf)>,
    /// Source's and destination's calls, after the end.
    calls: Vec<Calls>,
}

impl Strace {
    /// Writes its logs into `folder`.
    ///
    /// # Errors
    /// [`BenchError::Missing`] where there is no strace.
    pub fn new(folder: PathBuf) -> Result<Self, BenchError> {
        let there = Command::new("strace").arg("--version").stdout(Stdio::null()).status();
        match there.is_ok_and(|status| status.success()) {
            true => Ok(Self { folder, running: Vec::new(), calls: Vec::new() }),
            false => Err(BenchError::Missing {
                program: "strace".into(),
                remedy: "run ci/setup, or give --no-count to leave system calls out".into(),
            }),
        }
    }

    /// The source's calls and the destination's, for a run that has ended.
    pub fn into_calls(mut self) -> Vec<Calls> {
        std::mem::take(&mut self.calls)
    }

    fn attach(&mut self, pid: u32) -> Result<(), BenchError> {
        let log = self.folder.join(format!("{pid}.strace"));
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-xx", "-s", "4", "-o"]).arg(&log).args(["-p", &pid.to_string()]);
        let child = command.stdin(Stdio::null()).spawn().map_err(failed("starting"))?;
        self.running.push((child, log));
        let begun = Instant::now();
        while !is_traced(pid) {
            let ended =
                self.running.last_mut().is_none_or(|(child, _)| !matches!(child.try_wait(), Ok(None)));
            if ended || begun.elapsed() > ATTACH_TIMEOUT {
                return Err(failed("attaching")(io::Error::other(format!("process {pid} is not traced"))));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

impl Watcher for Strace {
    fn begin(&mut self, source: u32, destination: u32) -> Result<(), BenchError> {
        // The source may be this process: once it is traced, its new children are traced too.
        self.attach(destination)?;
        self.attach(source)
    }

    fn end(&mut self) -> Result<(), BenchError> {
        for (mut child, log) in self.running.drain(..).rev() {
            // strace detaches from the process and writes the rest of its log.
            interrupt(&child);
            child.wait().map_err(failed("ending"))?;
            let text = std::fs::read_to_string(&log).map_err(failed("reading its log"))?;
            let _ = std::fs::remove_file(&log);
            self.calls.push(Calls::parse(&text));
        }
        Ok(())
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        for (child, _) in &mut self.running {
            interrupt(child);
            let _ = child.wait();
        }
    }
}

fn interrupt(child: &Child) {
    if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
        let _ = kill_process(pid, Signal::INT);
    }
}

/// True once every thread of the process has a tracer.
fn is_traced(pid: u32) -> bool {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    tasks.flatten().all(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
    })
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "strace".into(), doing, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn calls_are_counted_once_and_doorbells_are_told_from_other_writes() {
        let log = "\
17 write(9, \"\\x1c\\x00\\x00\\x00\"..., 32) = 32
17 write(9, \"\\x17\\x00\\x00\\x00\"..., 16) = 16
18    ppoll([{fd=4, events=POLLIN}], 1, NULL, NULL, 8 <unfinished ...>
17 --- SIGIPI {si_signo=SIGRT_6} ---
18 <... ppoll resumed>) = 1 ([{fd=4, revents=POLLIN}])
17 write(9, \"\\x1c\\x00\\x00\\x00\"..., 32 <unfinished ...>
17 <... write resumed>) = 32
19 +++ exited with 0 +++
";
        let calls = Calls::parse(log);
        assert_eq!((calls.total, calls.doorbells), (4, 2));
        assert_eq!(calls.by_name, BTreeMap::from([("write".to_owned(), 3), ("ppoll".to_owned(), 1)]));
    }

    #[test]
    fn a_process_is_watched_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let Ok(mut strace) = Strace::new(dir.path().to_owned()) else {
            return println!("skipped: there is no strace");
        };
        let shell = || {
            let mut command = Command::new("sh");
            command.args(["-c", "while read line; do echo $line; done"]);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
        };
        let mut two = [shell(), shell()];
        if let Err(error) = strace.begin(two[0].id(), two[1].id()) {
            two.iter_mut().for_each(|child| child.kill().unwrap());
            return println!("skipped: {error}");
        }
        io::Write::write_all(two[0].stdin.as_mut().unwrap(), b"one\ntwo\n").unwrap();
        let mut said = [0; 8];
        io::Read::read_exact(two[0].stdout.as_mut().unwrap(), &mut said).unwrap();
        strace.end().unwrap();
        assert_eq!(strace.calls[0].by_name["write"], 2, "{:?}", strace.calls);
        assert!(!strace.calls[1].by_name.contains_key("write"), "{:?}", strace.calls);
        for child in &mut two {
            drop(child.stdin.take());
            assert!(child.wait().unwrap().success());
        }
    }
}
