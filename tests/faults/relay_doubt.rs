//! A relay whose process ends at any moment: before COMMIT its source is released immediately, from COMMIT on it is
//! held.
//!
//! The source and the far end send the bytes of QEMUs.

mod bytes;
mod more;

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ramwire::ram::BlockName;
use ramwire::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use ramwire::stream::qemu::command::{Command as Order, encode_discards};
use ramwire::stream::qemu::file::{self, Configuration};
use ramwire::stream::qemu::package::encode_package;
use ramwire::stream::qemu::ram;
use ramwire::stream::qemu::return_path::Message;
use ramwire::stream::qemu::section::{
    SectionName, encode_end, encode_eof, encode_footer, encode_full, encode_part, encode_start,
    encode_vm_description,
};
use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Deadline, scratch};
use crate::qemu::state_or_none;
use bytes::{DESCRIPTION, encoded, end, order, round, setup_of, setup_of_postcopy};
pub(super) use bytes::{setup, shut};

/// Where the relay's output goes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Output {
    File,
    /// Pipes whose readers are closed.
    Gone,
    /// A device without room.
    Full,
}

/// A relay between two sockets of the test.
pub(super) struct Relayed {
    pub(super) source: UnixStream,
    pub(super) far: UnixStream,
    relay: Child,
    guardian: u32,
    errors: PathBuf,
}

impl Drop for Relayed {
    fn drop(&mut self) {
        let _ = self.relay.kill();
        let _ = self.relay.wait();
    }
}

impl Relayed {
    /// The source has sent its setup and a round, and the far end has received them.
    fn start(dir: &Path, output: Output, options: &[&str]) -> Self {
        Self::start_over(dir, output, options, &setup(), &mut Vec::new())
    }

    /// The same with another setup, and with a second connection on each side if there is room for them: at the source
    /// and at the far end.
    fn start_over(
        dir: &Path,
        output: Output,
        options: &[&str],
        setup: &[u8],
        urgent: &mut Vec<UnixStream>,
    ) -> Self {
        let connect = |near: &Path| UnixStream::connect(near).ok();
        let listen = |far: &Path| {
            let listener = UnixListener::bind(far).unwrap();
            move || listener.accept().unwrap().0
        };
        Self::start_between(dir, output, options, setup, urgent, connect, listen)
    }

    /// The same with ends that connect by `connect`, and listen by `listen`, which returns what accepts.
    pub(super) fn start_between<Accept: FnMut() -> UnixStream>(
        dir: &Path,
        output: Output,
        options: &[&str],
        setup: &[u8],
        urgent: &mut Vec<UnixStream>,
        connect: impl Fn(&Path) -> Option<UnixStream>,
        listen: impl FnOnce(&Path) -> Accept,
    ) -> Self {
        let is_urgent = urgent.capacity() > 0;
        let [near, far] = ["near", "far"].map(|name| dir.join(name));
        let [errors, out] = ["errors", "out"].map(|name| dir.join(name));
        for old in [&near, &far] {
            let _ = fs::remove_file(old);
        }
        let mut accept = listen(&far);
        let uri = |path: &Path| format!("unix:{}", path.display());
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(env!("CARGO_BIN_EXE_ramwire"));
        command.args(["relay", "--peer", "qemu-7.2"]).args(options);
        command.args(["--listen", &uri(&near), "--connect", &uri(&far)]).stdin(Stdio::null());
        match output {
            Output::File => {
                command.stdout(File::create(&out).unwrap()).stderr(File::create(&errors).unwrap());
            }
            Output::Gone => drop(command.stdout(Stdio::piped()).stderr(Stdio::piped())),
            Output::Full => {
                let full = || File::options().write(true).open("/dev/full").unwrap();
                command.stdout(full()).stderr(full());
            }
        }
        let mut relay = command.spawn().expect("cannot start setpriv (util-linux)");
        drop((relay.stdout.take(), relay.stderr.take()));
        let said = || fs::read_to_string(&errors).unwrap_or_default();
        let mut source = Deadline::seconds(60).poll("the relay listens", said, || connect(&near));
        urgent.extend(is_urgent.then(|| connect(&near).unwrap()));
        source.write_all(&[setup, &round()].concat()).unwrap();
        let far = accept();
        urgent.extend(is_urgent.then(accept));
        for end in [&source, &far] {
            end.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        }
        let pong = encoded(Message::Pong(1));
        let mut answer = vec![0; pong.len()];
        source.read_exact(&mut answer).unwrap();
        assert_eq!(answer, pong);
        let children = format!("/proc/{0}/task/{0}/children", relay.id());
        let guardian = fs::read_to_string(children).unwrap();
        let guardian = guardian.split_whitespace().next().expect("a guardian").parse().unwrap();
        let mut relayed = Self { source, far, relay, guardian, errors };
        relayed.far_gets(&[7; 4096]);
        relayed
    }

    /// Reads at the far end up to `last`.
    fn far_gets(&mut self, last: &[u8]) {
        let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
        while !read.windows(last.len()).any(|bytes| bytes == last) {
            let got = self.far.read(&mut buffer).unwrap();
            assert!(got > 0, "the far end's stream ended early: {}", self.said());
            read.extend_from_slice(&buffer[..got]);
        }
    }

    pub(super) fn said(&self) -> String {
        fs::read_to_string(&self.errors).unwrap_or_default()
    }

    /// The far end has received everything, and sends nothing.
    pub(super) fn give_away(&mut self) {
        self.source.write_all(&end(true)).unwrap();
        self.far_gets(DESCRIPTION);
    }

    pub(super) fn signal(&self, signal: Signal) {
        // It may have ended by the previous signal.
        let _ = kill_process(Pid::from_raw(self.relay.id() as i32).unwrap(), signal);
    }

    pub(super) fn status(&mut self) -> Option<i32> {
        let errors = self.errors.clone();
        let said = || fs::read_to_string(&errors).unwrap_or_default();
        Deadline::seconds(60).poll("the relay ends", said, || self.relay.try_wait().unwrap()).code()
    }

    /// The messages that the source received, up to the end of its connection. A reset counts as an end too.
    pub(super) fn told(&mut self) -> Vec<u8> {
        let mut told = Vec::new();
        if let Err(error) = self.source.read_to_end(&mut told) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
        told
    }

    /// Sends these signals immediately, and the last of them repeatedly until the relay has ended: two of a kind may
    /// count as one (signal(7)).
    fn ends_by(&mut self, signals: &[Signal]) -> Option<i32> {
        signals.iter().for_each(|signal| self.signal(*signal));
        let pid = Pid::from_raw(self.relay.id() as i32).unwrap();
        let errors = self.errors.clone();
        let said = || fs::read_to_string(&errors).unwrap_or_default();
        let ended = || {
            let ended = self.relay.try_wait().unwrap();
            if ended.is_none() {
                let _ = kill_process(pid, signals[signals.len() - 1]);
            }
            ended
        };
        Deadline::seconds(60).poll("the relay ends", said, ended).code()
    }

    /// The source's connection is open, and no message was sent. Descriptors that the relay's end closes are closed
    /// when its process has ended.
    pub(super) fn source_is_held(&self, what: &str) {
        self.source.set_nonblocking(true).unwrap();
        let read = (&self.source).read(&mut [0; 16]);
        self.source.set_nonblocking(false).unwrap();
        let error = read.map(|got| format!("{got} bytes")).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "{what}");
    }

    pub(super) fn guardian_ends(&self) {
        let ended = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.guardian)).unwrap_or_default();
            // An unreaped process stays a zombie in some containers.
            (stat.is_empty() || stat.contains(") Z ")).then_some(())
        };
        Deadline::seconds(60).poll("the guardian ends", || self.said(), ended);
    }

    pub(super) fn decide(&self) {
        // It may have ended by the previous signal.
        let _ = kill_process(Pid::from_raw(self.guardian as i32).unwrap(), Signal::USR1);
    }
}

const ENDS: [&[Signal]; 4] = [
    &[Signal::KILL],
    &[Signal::TERM, Signal::TERM],
    &[Signal::HUP, Signal::HUP],
    &[Signal::INT, Signal::INT],
];

#[test]
fn before_commit_the_end_of_a_relay_frees_its_source_at_once() {
    for (at, signals) in ["round", "state"].into_iter().flat_map(|at| ENDS.map(|signals| (at, signals))) {
        let dir = scratch();
        let mut relayed = Relayed::start(dir.path(), Output::File, &[]);
        if at == "state" {
            relayed.source.write_all(&end(false)).unwrap();
        }
        let status = relayed.ends_by(signals);
        let cancelled = signals != ENDS[0];
        assert_eq!(status, cancelled.then_some(4), "{at} {signals:?}: {}", relayed.said());
        // A failure message or a closed connection: either makes the source continue.
        let told = relayed.told();
        assert!(told.is_empty() || told == shut(1), "{at} {signals:?}: {told:?}");
        relayed.guardian_ends();
    }
}

#[test]
fn after_commit_the_end_of_a_relay_leaves_its_source_held_until_the_far_end_answers() {
    for (signals, status) in ENDS.into_iter().flat_map(|signals| [0, 1].map(|status| (signals, status))) {
        let dir = scratch();
        let keep = dir.path().join("kept");
        let mut relayed = Relayed::start(dir.path(), Output::File, &["--keep", keep.to_str().unwrap()]);
        relayed.give_away();
        let ended = relayed.ends_by(signals);
        let what = format!("{signals:?}: {}", relayed.said());
        assert_eq!(ended, (signals != ENDS[0]).then_some(5), "{what}");
        relayed.source_is_held(&what);
        assert_ne!(state_or_none(&keep), "whole", "{what}");
        relayed.far.write_all(&shut(status)).unwrap();
        let mut told = vec![0; shut(status).len()];
        relayed.source.read_exact(&mut told).unwrap();
        assert_eq!(told, shut(status), "{what}");
        // A QEMU closes when it has received the message.
        relayed.source.shutdown(std::net::Shutdown::Both).unwrap();
        relayed.guardian_ends();
    }
}

#[test]
fn whoever_looks_after_a_guest_in_doubt_decides_also_when_the_relay_is_gone() {
    for source_ends in [false, true] {
        let dir = scratch();
        let mut relayed = Relayed::start(dir.path(), Output::File, &[]);
        relayed.give_away();
        relayed.signal(Signal::KILL);
        relayed.status();
        // Signals that a service manager or a terminal sends to all processes of a relay have no effect.
        for signal in [Signal::TERM, Signal::HUP, Signal::INT] {
            kill_process(Pid::from_raw(relayed.guardian as i32).unwrap(), signal).unwrap();
        }
        relayed.far.shutdown(std::net::Shutdown::Both).unwrap();
        let says = || relayed.said().contains("ended its connection without").then_some(());
        Deadline::seconds(60).poll("the guardian sees the far end go", || relayed.said(), says);
        assert!(relayed.said().contains(&format!("kill -USR1 {}", relayed.guardian)), "{}", relayed.said());
        relayed.source_is_held("nobody has decided");
        if source_ends {
            relayed.source.shutdown(std::net::Shutdown::Both).unwrap();
        } else {
            relayed.decide();
            let mut told = vec![0; shut(1).len()];
            relayed.source.read_exact(&mut told).unwrap();
            assert_eq!(told, shut(1));
            relayed.source.shutdown(std::net::Shutdown::Both).unwrap();
        }
        relayed.guardian_ends();
    }
}

#[test]
fn a_relay_in_doubt_lives_on_whatever_becomes_of_its_output_and_hears_a_late_answer() {
    for output in [Output::File, Output::Gone, Output::Full] {
        for answer in [Some(0), Some(1), None] {
            let dir = scratch();
            let keep = dir.path().join("kept");
            let options = ["--finish-timeout", "0.05", "--keep", keep.to_str().unwrap()];
            let mut relayed = Relayed::start(dir.path(), output, &options);
            relayed.give_away();
            if matches!(output, Output::File) {
                let says = || relayed.said().contains("in doubt").then_some(());
                Deadline::seconds(60).poll("the operator is told", || relayed.said(), says);
            }
            match answer {
                Some(status) => relayed.far.write_all(&shut(status)).unwrap(),
                // No effect until the guest is in doubt.
                None => Deadline::seconds(60).poll("a decision", String::new, || {
                    relayed.decide();
                    std::thread::sleep(Duration::from_millis(20));
                    relayed.relay.try_wait().unwrap().map(drop)
                }),
            }
            let status = answer.unwrap_or(1);
            let ended = relayed.status();
            assert_eq!(
                ended,
                Some(if status == 0 { 0 } else { 3 }),
                "{output:?} {answer:?}: {}",
                relayed.said()
            );
            assert_eq!(relayed.told(), shut(status), "{output:?} {answer:?}");
            // The guest runs at one of the two, so the saved guest is at best in doubt.
            assert_ne!(state_or_none(&keep), "whole", "{output:?} {answer:?}");
            relayed.guardian_ends();
        }
    }
}

#[test]
fn a_relay_in_doubt_whose_source_has_gone_ends_and_says_in_doubt() {
    let dir = scratch();
    let keep = dir.path().join("kept");
    let options = ["--finish-timeout", "0.05", "--keep", keep.to_str().unwrap()];
    let mut relayed = Relayed::start(dir.path(), Output::File, &options);
    relayed.give_away();
    let says = || relayed.said().contains("in doubt").then_some(());
    Deadline::seconds(60).poll("the operator is told", || relayed.said(), says);
    relayed.source.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(relayed.status(), Some(5), "{}", relayed.said());
    assert_eq!(relayed.told(), [0u8; 0], "a source that still reads is told nothing");
    assert_eq!(state_or_none(&keep), "in-doubt");
    relayed.guardian_ends();
}

/// A QEMU counts the end of either connection as the end of both, and takes its guest back if it does not know yet that it
/// was taken: both are held.
#[test]
fn a_relay_that_is_killed_after_run_leaves_both_connections_of_its_source_held() {
    for signals in ENDS {
        let what = format!("{signals:?}");
        let dir = scratch();
        let mut urgent = Vec::with_capacity(2);
        let options = ["--postcopy-preempt"];
        let mut relayed =
            Relayed::start_over(dir.path(), Output::File, &options, &setup_of_postcopy(), &mut urgent);
        let mut switch = Vec::new();
        encode_discards("m0", &[(0, 8192)], &mut switch);
        switch.extend(order(Order::Ping(2)));
        let (mut package, mut devices) = (Vec::new(), Vec::new());
        encode_full(&SectionName { id: 3, idstr: "timer", instance: 0, version: 2 }, &mut devices);
        encode_footer(3, &mut devices);
        encode_package(&devices, true, &mut package);
        switch.extend(order(Order::Packaged { size: package.len() as u32 }));
        switch.extend([package, order(Order::Ping(4))].concat());
        relayed.source.write_all(&switch).unwrap();
        relayed.far_gets(&order(Order::Ping(0x42)));
        relayed.far.write_all(&encoded(Message::Pong(2))).unwrap();
        relayed.far_gets(&order(Order::PostcopyRun));
        // What was answered to the source before.
        let answers = [Message::Pong(2), Message::Pong(4)].map(encoded).concat();
        let mut heard = vec![0; answers.len()];
        relayed.source.read_exact(&mut heard).unwrap();
        assert_eq!(heard, answers, "{what}");
        relayed.ends_by(signals);
        relayed.source_is_held(&what);
        let mut source_urgent = &urgent[0];
        source_urgent.write_all(&[0; 4096]).unwrap();
        source_urgent.set_nonblocking(true).unwrap();
        let read = source_urgent.read(&mut [0]).expect_err(&what);
        assert_eq!(read.kind(), ErrorKind::WouldBlock, "{what}");
        relayed.far.write_all(&[Message::Pong(3), Message::Pong(0x42)].map(encoded).concat()).unwrap();
        let taken = [Message::Pong(3), Message::Pong(0x42)].map(encoded).concat();
        assert_eq!(relayed.told(), taken, "{what}");
        // The guardian lets go when the source has.
        relayed.source.shutdown(std::net::Shutdown::Both).unwrap();
        relayed.guardian_ends();
    }
}
