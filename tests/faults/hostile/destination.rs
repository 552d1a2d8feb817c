//! A hostile destination.

use super::*;

/// The first message of a hostile destination.
fn greeting() -> Vec<u8> {
    let hello = Hello::ours(ID, true);
    let answers = [
        Message::Pong(GREETING),
        Message::Pong(hello_pong(MAX_VERSION)),
        Message::Pong(1),
        Message::Native(Answer::Hello(hello)),
    ];
    made(|out| answers.iter().for_each(|answer| answer.encode(out)))
}

fn said(message: &Message<'_>) -> Vec<u8> {
    made(|out| message.encode(out))
}

/// A source that receives `head` at once, then `again` without end; all it sends is discarded.
fn answer(live: &Live, head: Vec<u8>, again: Vec<u8>) -> SourceReport {
    let (near, far) = UnixStream::pair().unwrap();
    let (mut reader, mut writer) = (far.try_clone().unwrap(), far);
    let reading = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    let writing = std::thread::spawn(move || {
        let mut went = writer.write_all(&head);
        while went.is_ok() && !again.is_empty() {
            went = writer.write_all(&again);
        }
        writer
    });
    let (sink, back) = channel(near, IMPATIENT).split();
    let session = source(live, Box::new(live.clone()), Box::new(sink), Box::new(back), settings(IMPATIENT));
    let begun = Instant::now();
    let report = session.run();
    assert!(begun.elapsed() < SOON, "{:?} after {:?}", report.error, begun.elapsed());
    drop(writing.join().unwrap().shutdown(Shutdown::Both));
    drop(reading.join());
    report
}

#[test]
fn a_destination_that_lies_is_refused_and_the_guest_runs_on() {
    let live = Live::running(11, 500);
    let g = greeting();
    let hello = |max_version, migration_id, digest| {
        let hello = Hello { min_version: 1, max_version, ..Hello::ours(migration_id, digest) };
        let pongs = &g[..g.len() - said(&Message::Native(Answer::Hello(hello))).len()];
        stream(&[pongs, &said(&Message::Native(Answer::Hello(hello)))])
    };
    let long = "x".repeat(400);
    let cases: [Case<'_>; 14] = [
        ("noise", vec![0xff; 64], &["at byte"]),
        ("message of 64 KiB", stream(&[&g, &[0, 2, 0xff, 0xff]]), &["at byte"]),
        ("message of no kind", stream(&[&g, &[0, 99, 0, 0]]), &["at byte", "99"]),
        ("HELLO of version 7", hello(7, ID, true), &["version 7"]),
        ("HELLO of version 0", hello(0, ID, true), &["version 0"]),
        ("HELLO of another migration", hello(MAX_VERSION, [0; 16], true), &["HELLO"]),
        ("HELLO without the digest", hello(MAX_VERSION, ID, false), &["HELLO"]),
        ("success before anything was sent", said(&Message::Shut { status: 0 }), &["Shut"]),
        ("failure", stream(&[&g, &said(&Message::Shut { status: 3 })]), &["status 3"]),
        ("RUNNING before COMMIT", stream(&[&g, &said(&Message::Native(Answer::Running))]), &["Running"]),
        ("READY before the state", stream(&[&g, &said(&Message::Native(Answer::Ready))]), &["Ready"]),
        (
            "a page request",
            stream(&[&g, &said(&Message::RequestPages { start: 0, length: 1 })]),
            &["PageRequest"],
        ),
        ("a long refusal", stream(&[&g, &said(&Message::Native(Answer::Refused { why: &long }))]), &["xxx"]),
        ("no RAMWIRE", said(&Message::Pong(1)), &["greeting"]),
    ];
    for (what, bytes, says) in cases {
        let sent = answer(&live, bytes, Vec::new());
        let text =
            sent.error.as_ref().map(|error| ramwire::error::Chain(error).to_string()).unwrap_or_default();
        println!("{what}: {text}");
        assert_stayed(what, &live, &sent);
        for word in says {
            assert!(text.contains(word), "{what}: {text:?} does not say {word:?}");
        }
        live.assert_runs_on(what);
    }
    migrate_cleanly(&live, "after all lies");
}

#[test]
fn a_destination_that_talks_without_end_is_left_and_takes_no_memory() {
    let live = Live::running(12, 500);
    let before = reset_peak();
    for (what, again) in [
        ("PONGs", said(&Message::Pong(7)).repeat(1000)),
        ("acks", said(&Message::SwitchoverAck).repeat(1000)),
        ("greetings", greeting()),
        // Until the source's own bound: its amount of RAM explains no longer wait.
        ("work", said(&Message::Native(Answer::Working)).repeat(1000)),
    ] {
        let sent = answer(&live, greeting(), again);
        println!("endless {what}: {:?}", sent.error);
        assert_stayed(what, &live, &sent);
        live.assert_runs_on(what);
    }
    assert_bounded("floods from a destination", before);
    migrate_cleanly(&live, "after all floods");
}

/// Answers that are always there already, `most` bytes of them: reading them never waits.
struct Flood {
    head: Vec<u8>,
    again: Vec<u8>,
    at: usize,
    most: usize,
}

impl ramwire::transport::Sealed for Flood {}

impl ByteSource for Flood {
    fn recv(&mut self, into: &mut [RecvPart<'_>], _: &Stop) -> Result<usize, ChannelError> {
        let Some(RecvPart::Own(room)) = into.first_mut() else { return Ok(0) };
        if self.at >= self.most {
            return Ok(0);
        }
        for byte in room.iter_mut() {
            let past = self.at.checked_sub(self.head.len());
            *byte = past.map_or_else(|| self.head[self.at], |past| self.again[past % self.again.len()]);
            self.at += 1;
        }
        Ok(room.len())
    }
}

#[test]
fn answers_that_are_always_there_already_do_not_put_off_the_end_of_a_wait() {
    let live = Live::running(14, 500);
    for (what, word) in [
        ("PONG", Message::Pong(7)),
        ("ack", Message::SwitchoverAck),
        ("work", Message::Native(Answer::Working)),
    ] {
        // More than can be read within the timeouts on any machine, less than keeps a broken build for hours.
        let most = 8 << 30;
        let flood = Flood { head: greeting(), again: said(&word), at: 0, most };
        let (near, far) = UnixStream::pair().unwrap();
        let reading = std::thread::spawn(move || std::io::copy(&mut &far, &mut std::io::sink()));
        let (sink, _) = channel(near, IMPATIENT).split();
        let control = Box::new(live.clone());
        let sent = source(&live, control, Box::new(sink), Box::new(flood), settings(IMPATIENT)).run();
        assert!(matches!(sent.error, Some(Error::NoAnswer { .. })), "{what}: {:?}", sent.error);
        assert_stayed(what, &live, &sent);
        drop(sent);
        drop(reading.join());
    }
}

#[test]
fn a_destination_that_falls_silent_after_commit_leaves_the_guest_in_doubt() {
    let live = Live::running(13, 500);
    let (near, far) = UnixStream::pair().unwrap();
    // READY is sent when it is due: after STATE_SENT, which the digests follow.
    let mut far_writer = far.try_clone().unwrap();
    let listening = std::thread::spawn(move || {
        let (mut far, mut heard, mut said_ready) = (far, Vec::new(), false);
        let mut buffer = [0; 4096];
        far_writer.write_all(&greeting()).unwrap();
        while let Ok(got @ 1..) = far.read(&mut buffer) {
            heard.extend_from_slice(&buffer[..got]);
            if !said_ready && heard.windows(5).any(|at| at == [8, 0x52, 3, 0, 36]) {
                far_writer.write_all(&said(&Message::Native(Answer::Ready))).unwrap();
                said_ready = true;
            }
        }
        heard.windows(3).any(|at| at == [8, 0x52, 4])
    });
    let (sink, back) = channel(near, IMPATIENT).split();
    let session = source(&live, Box::new(live.clone()), Box::new(sink), Box::new(back), settings(IMPATIENT));
    let cancel = session.cancel_token();
    let sent = session.run();
    assert_eq!(sent.outcome, Outcome::InDoubt, "{:?}", sent.error);
    assert!(!live.runs() && !sent.guest_is_safe_here() && !cancel.is_cancelled());
    assert!(listening.join().unwrap(), "COMMIT was said");
    let text = ramwire::error::Chain(&sent.error.unwrap()).to_string();
    assert!(text.contains("that the guest runs") || text.contains("no byte moved"), "{text}");
    live.assert_whole("in doubt");
}
