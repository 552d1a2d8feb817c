//! At a terminal: a command of `exec:` that reads from it, and the progress line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::memory::{Pattern, fill};
use crate::common::{Deadline, ramwire::Ramwire, scratch};

/// A `ramwire` in the foreground of a terminal of its own; dropping this closes the terminal.
struct AtTerminal {
    script: Child,
    shown: PathBuf,
}

impl Drop for AtTerminal {
    fn drop(&mut self) {
        let _ = self.script.kill();
        let _ = self.script.wait();
    }
}

impl AtTerminal {
    fn start(dir: &Path, arguments: &[&str]) -> Self {
        let quoted = |word: &&str| format!("'{}'", word.replace('\'', "'\\''"));
        let words: Vec<_> = [env!("CARGO_BIN_EXE_ramwire")].iter().chain(arguments).map(quoted).collect();
        let shown = dir.join(format!("shown-{}", fs::read_dir(dir).map_or(0, Iterator::count)));
        let script = Command::new("script")
            .args(["--quiet", "--return", "--flush", "--command"])
            .arg(format!("exec {}", words.join(" ")))
            .arg(&shown)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("cannot start script (util-linux)");
        Self { script, shown }
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.shown).unwrap_or_default()).into_owned()
    }

    fn ended(&mut self) -> (Option<i32>, String) {
        let (script, shown) = (&mut self.script, self.shown.clone());
        let read = || fs::read_to_string(&shown).unwrap_or_default();
        let status = Deadline::seconds(60).poll("the command's end", read, || script.try_wait().unwrap());
        (status.code(), self.shown())
    }
}

fn state(folder: &Path) -> Option<String> {
    let text = fs::read_to_string(folder.join("manifest.json")).ok()?;
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    manifest["state"].as_str().map(str::to_owned)
}

/// A folder that holds a guest of this many bytes.
fn arrived(dir: &Path, bytes: usize) -> PathBuf {
    let (ram, folder) = (dir.join("ram"), dir.join("guest"));
    fs::write(&ram, vec![7; bytes]).unwrap();
    let mut receiver = Ramwire::start(dir, &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &folder);
    let block = format!("m0={}", ram.display());
    let send = ["send", &receiver.listening(), "--json", "--ram"];
    Ramwire::start(dir, &send, block).finished(Deadline::seconds(20), 0);
    receiver.finished(Deadline::seconds(20), 0);
    folder
}

/// Also if the whole guest fits into the socket to the command.
#[test]
fn a_command_that_asks_at_the_terminal_is_no_destination_and_the_guest_stays() {
    [64 << 10, 4 << 20].into_iter().for_each(command_that_asks);
}

fn command_that_asks(bytes: usize) {
    let dir = scratch();
    let folder = arrived(dir.path(), bytes);
    let file = dir.path().join("file");
    let folder_name = folder.to_str().unwrap();
    let asks = "tried to use the terminal";
    for (command, says) in [
        (format!("exec:read answer </dev/tty; cat >{}", file.display()), asks),
        (format!("exec:stty raw </dev/tty; cat >{}", file.display()), asks),
        ("exec:exec sleep 1000".into(), "--stall-timeout"),
        ("exec:exec true".into(), "exec true"),
        ("exec:exec head -c 1 >/dev/null".into(), "exec head"),
    ] {
        let arguments = ["send", &command, "--peer=qemu-10.0", "--stall-timeout=2", "--dir", folder_name];
        let (status, shown) = AtTerminal::start(dir.path(), &arguments).ended();
        assert_eq!(status, Some(3), "{command}: {shown}");
        assert!(shown.contains(says), "{command}: {shown}");
        assert_eq!(state(&folder).as_deref(), Some("whole"), "{command}: {shown}");
        assert!(!file.exists(), "{command}: it went on");
    }
    // Another command that reads everything has the guest.
    let command = format!("exec:cat >{}", file.display());
    let arguments = ["send", &command, "--peer=qemu-10.0", "--dir", folder_name];
    let (status, shown) = AtTerminal::start(dir.path(), &arguments).ended();
    assert_eq!((status, state(&folder).as_deref()), (Some(0), Some("sent")), "{shown}");

    let next = dir.path().join("next");
    let command = format!("exec:read answer </dev/tty; cat {}", file.display());
    let arguments = ["receive", &command, "--dir", next.to_str().unwrap()];
    let (status, shown) = AtTerminal::start(dir.path(), &arguments).ended();
    assert_eq!(status, Some(3), "{shown}");
    assert!(shown.contains(asks), "{shown}");
    assert_eq!(state(&next), None, "{shown}");
}

/// Percent and rate of a line as `███░░░  40%  4.0 MB/s  12 MB left  ETA 3.0 s`.
fn percent_and_rate(line: &str) -> Option<(u32, &str)> {
    let (bar, rest) = line.split_once('%')?;
    let percent = bar.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    Some((percent, rest.split_once("/s")?.0.trim()))
}

#[test]
fn a_receiver_shows_how_much_of_the_guest_is_there_and_at_which_rate_it_comes() {
    for channels in ["0", "2"] {
        let dir = scratch();
        let ram = dir.path().join("ram");
        fill(&ram, 16, Pattern::Random { seed: 4 });
        let folder = dir.path().join("guest");
        let socket = format!("unix:{}", dir.path().join("socket").display());
        let arguments = ["receive", &socket, "--channels", channels, "--dir", folder.to_str().unwrap()];
        let mut receiver = AtTerminal::start(dir.path(), &arguments);
        Deadline::seconds(20)
            .poll("listening", String::new, || receiver.shown().contains("listening on ").then_some(()));
        let block = format!("--ram=m0={}", ram.display());
        let arguments = ["send", &socket, "--json", "--channels", channels, "--max-bandwidth=4M", &block];
        let mut sender = Ramwire::start(dir.path(), &arguments, "--peer=ramwire");
        let lines = |shown: &str| -> Vec<_> {
            let found = shown.split(['\r', '\n']).filter_map(percent_and_rate);
            found.map(|(percent, rate)| (percent, rate.to_owned())).collect()
        };
        Deadline::seconds(60).poll(
            "a part of the guest, and its rate",
            || receiver.shown(),
            || {
                let part = |(percent, rate): &(u32, String)| (1..100).contains(percent) && rate != "0 B";
                lines(&receiver.shown()).iter().any(part).then_some(())
            },
        );
        sender.finished(Deadline::seconds(60), 0);
        let (status, shown) = receiver.ended();
        assert_eq!(status, Some(0), "{shown}");
        let seen = lines(&shown);
        assert!(seen.is_sorted_by_key(|(percent, _)| *percent), "{seen:?}");
        assert!(shown.contains("16.00 MiB of RAM"), "{shown}");
    }
}
