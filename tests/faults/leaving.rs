//! `ramwire send` is ended by signals at each of its stages: its status and its folder must be correct.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::{fs, thread};

use ramwire::stream::native::{Answer, GREETING, Hello, MAX_VERSION, hello_pong};
use ramwire::stream::qemu::return_path::Message;
use rustix::process::Signal;

use crate::command::{received, signal};
use crate::common::{Deadline, memory::compare, ramwire::Ramwire, scratch};

/// The last message that a destination sends before it is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Says {
    Hello,
    Ready,
}

/// The last message of the destination, the rate at which the source sends, and the action that the source then
/// reaches.
type Stage = (Says, &'static str, &'static str);

/// The guest's pages take minutes.
const IN_A_ROUND: Stage = (Says::Hello, "4K", "action=Send\n");
const WITHOUT_READY: Stage = (Says::Hello, "0", "waiting=Ready");
const WITHOUT_RUNNING: Stage = (Says::Ready, "0", "waiting=Running");

/// A destination that is silent from some moment on. Ends when the source does; true if COMMIT was received.
fn silent_after(says: Says, listener: &TcpListener) -> bool {
    let (mut source, _) = listener.accept().unwrap();
    let (mut heard, mut buffer, mut turn) = (Vec::new(), vec![0; 1 << 16], 0);
    let find = |heard: &[u8], what: &[u8]| heard.windows(what.len()).position(|at| at == what);
    let say = |source: &mut TcpStream, messages: &[Message<'_>]| {
        let mut out = Vec::new();
        messages.iter().for_each(|message| message.encode(&mut out));
        source.write_all(&out).unwrap();
    };
    while let Ok(got @ 1..) = source.read(&mut buffer) {
        heard.extend_from_slice(&buffer[..got]);
        // An order may be split across two reads.
        let news = &heard[heard.len().saturating_sub(got + 64)..];
        if turn == 0 {
            let pongs = [GREETING, hello_pong(MAX_VERSION), 1].map(Message::Pong);
            say(&mut source, &pongs);
            turn = 1;
        }
        // HELLO: type, number, length, two versions, the id, a flag.
        if let (1, Some(at)) = (turn, find(news, &[8, 0x52, 1]))
            && let Some(body) = news.get(at + 9..at + 26)
        {
            let hello = Hello::ours(body[..16].try_into().unwrap(), body[16] == 1);
            say(&mut source, &[Message::Native(Answer::Hello(hello))]);
            turn = 2;
        }
        if turn == 2 && says >= Says::Ready && find(news, &[8, 0x52, 2, 0, 0]).is_some() {
            say(&mut source, &[Message::Native(Answer::Ready)]);
            turn = 3;
        }
    }
    find(&heard, &[8, 0x52, 4]).is_some()
}

/// A `send` of `folder` whose destination is silent, once it performs `action`; at `rate` bytes a second, 0 for no
/// limit.
fn stuck(dir: &Path, folder: &Path, stage: Stage) -> (Ramwire, thread::JoinHandle<bool>) {
    stuck_with(dir, folder, stage, &[])
}

fn stuck_with(
    dir: &Path,
    folder: &Path,
    (says, rate, action): Stage,
    more: &[&str],
) -> (Ramwire, thread::JoinHandle<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let far = thread::spawn(move || silent_after(says, &listener));
    let arguments = ["--log", "trace", "send", &uri, "--max-bandwidth", rate];
    let sender = Ramwire::start(dir, &[&arguments[..], more, &["--dir"]].concat(), folder);
    logged(&sender, action);
    (sender, far)
}

fn logged(sender: &Ramwire, text: &'static str) {
    let found = || sender.errors().contains(text).then_some(());
    Deadline::seconds(60).poll(text, || sender.errors(), found);
}

fn state(folder: &Path) -> String {
    let text = fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
    manifest["state"].as_str().unwrap().to_owned()
}

#[test]
fn whatever_signals_end_a_send_its_folder_says_what_is_true() {
    let (hup, int, kill, term) = (Signal::HUP, Signal::INT, Signal::KILL, Signal::TERM);
    let dir = scratch();
    let (ram, folder) = received(dir.path());
    for (stage, signals, status, left) in [
        (IN_A_ROUND, &[hup][..], 4, "whole"),
        (IN_A_ROUND, &[term, term], 4, "whole"),
        (IN_A_ROUND, &[hup, int, term], 4, "whole"),
        (IN_A_ROUND, &[kill], -1, "whole"),
        // The device state was sent, and the destination may not run it without COMMIT.
        (WITHOUT_READY, &[hup], 4, "whole"),
        (WITHOUT_READY, &[term, term], 4, "whole"),
        (WITHOUT_READY, &[hup, hup], 4, "whole"),
        // No process is left that could know.
        (WITHOUT_READY, &[kill], -1, "sending"),
    ] {
        let what = format!("{stage:?}: {signals:?}");
        let (mut sender, far) = stuck(dir.path(), &folder, stage);
        signals.iter().for_each(|each| signal(sender.pid(), *each));
        let (ended, errors) = sender.ended(Deadline::seconds(60));
        assert_eq!(ended, status, "{what}: {errors}");
        assert_eq!(state(&folder), left, "{what}: {errors}");
        assert!(!far.join().unwrap(), "{what}: COMMIT was said");
    }
    // The last one was killed: its operator has checked the destination.
    let next = dir.path().join("next");
    let mut receiver = Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &next);
    let uri = receiver.listening();
    Ramwire::start(dir.path(), &["send", &uri, "--json", "--destination-is-dead", "--dir"], &folder)
        .finished(Deadline::seconds(60), 0);
    receiver.finished(Deadline::seconds(60), 0);
    assert_eq!((&*state(&folder), &*state(&next)), ("sent", "whole"));
    compare(&ram, &next.join("ram-000.bin")).unwrap();
    // A guest that runs elsewhere still does, although it was to be sent again.
    let again = ["send", "tcp:127.0.0.1:1", "--again", "--dir"];
    Ramwire::start(dir.path(), &again, &folder).failed(Deadline::seconds(60), 3);
    assert_eq!(state(&folder), "sent");
}

/// A guest that runs elsewhere, is sent again, and is then in doubt.
#[test]
fn a_doubt_about_the_last_destination_does_not_make_a_guest_whole_that_runs_at_another() {
    let dir = scratch();
    let (_, folder) = received(dir.path());
    let next = dir.path().join("next");
    let mut receiver = Ramwire::start(dir.path(), &["receive", "tcp:127.0.0.1:0", "--json", "--dir"], &next);
    let send = ["send", &receiver.listening(), "--json", "--dir"];
    Ramwire::start(dir.path(), &send, &folder).finished(Deadline::seconds(60), 0);
    receiver.finished(Deadline::seconds(60), 0);
    assert_eq!(state(&folder), "sent");
    let (mut sender, far) = stuck_with(dir.path(), &folder, WITHOUT_RUNNING, &["--again"]);
    signal(sender.pid(), Signal::TERM);
    logged(&sender, "too late to cancel");
    signal(sender.pid(), Signal::TERM);
    sender.failed(Deadline::seconds(60), 5);
    assert!(far.join().unwrap(), "COMMIT was said");
    assert_eq!(state(&folder), "in-doubt");
    // That destination does not run it. The first one still does.
    let send = ["send", "tcp:127.0.0.1:1", "--destination-is-dead", "--dir"];
    let said = Ramwire::start(dir.path(), &send, &folder).failed(Deadline::seconds(60), 3);
    assert!(said.contains("--resend"), "{said}");
    let (mut sender, far) =
        stuck_with(dir.path(), &folder, IN_A_ROUND, &["--again", "--destination-is-dead"]);
    signal(sender.pid(), Signal::TERM);
    sender.failed(Deadline::seconds(60), 4);
    assert!(!far.join().unwrap(), "COMMIT was said");
    assert_eq!(state(&folder), "sent");
}

#[test]
fn after_commit_a_signal_is_refused_and_a_second_one_leaves_the_outcome_in_doubt() {
    let (hup, int, term) = (Signal::HUP, Signal::INT, Signal::TERM);
    for (first, second) in [(int, int), (hup, term)] {
        let dir = scratch();
        let (_, folder) = received(dir.path());
        let (mut sender, far) = stuck(dir.path(), &folder, WITHOUT_RUNNING);
        signal(sender.pid(), first);
        logged(&sender, "too late to cancel");
        assert_eq!(state(&folder), "sending");
        signal(sender.pid(), second);
        let text = sender.failed(Deadline::seconds(60), 5);
        assert!(text.contains("in doubt"), "{text}");
        assert_eq!(state(&folder), "in-doubt");
        assert!(far.join().unwrap(), "COMMIT was said");
    }
}

#[test]
fn under_nohup_a_send_outlives_its_terminal() {
    let dir = scratch();
    let (_, folder) = received(dir.path());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("tcp:{}", listener.local_addr().unwrap());
    let far = thread::spawn(move || silent_after(Says::Hello, &listener));
    let log = dir.path().join("log");
    let mut sender = Command::new("sh")
        .args([
            "-c",
            "trap '' HUP; exec \"$0\" --log trace send \"$1\" --max-bandwidth 4K --dir \"$2\" 2> \"$3\"",
        ])
        .arg(env!("CARGO_BIN_EXE_ramwire"))
        .arg(&uri)
        .args([&folder, &log])
        .process_group(0)
        .spawn()
        .unwrap();
    let read = || fs::read_to_string(&log).unwrap_or_default();
    Deadline::seconds(60).poll("its start", read, || read().contains("action=Send\n").then_some(()));
    signal(sender.id(), Signal::HUP);
    // If the first one were accepted, this would be the second.
    signal(sender.id(), Signal::TERM);
    assert_eq!(sender.wait().unwrap().code(), Some(4), "{}", read());
    assert!(!read().contains("once more"), "{}", read());
    assert!(!far.join().unwrap());
}
