//! Descriptors after connections of every kind, ended successfully and with errors. Alone in its process, because it
//! counts.
#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use ramwire::sys::{CancelToken, RecvPart, SendPart, Stop};
use ramwire::transport::{Address, AllowList, ByteSink, ByteSource, Listener, StreamOptions, connect};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn use_every_scheme(dir: &std::path::Path) {
    let mut options = StreamOptions::default();
    options.stall = Some(Duration::from_millis(20));
    let stop = Stop::on(&CancelToken::default()).within(Duration::from_secs(10));
    let dir = dir.display();
    for text in ["tcp::0".into(), "tcp:localhost:0".into(), format!("unix:{dir}/a.sock")] {
        let address: Address = text.parse().unwrap();
        let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
        let near = connect(listener.address(), &options, &stop).unwrap();
        let mut far = listener.accept(&options, &stop).unwrap();
        let (mut source, mut sink) = near.split();
        sink.send(&[SendPart::Own(b"bytes")], &stop).unwrap();
        assert!(source.recv(&mut [RecvPart::Own(&mut [0])], &stop).is_err());
        assert_eq!(far.recv(&mut [RecvPart::Own(&mut [0; 9])], &stop).unwrap(), 5);
    }
    for text in [format!("exec:cat > {dir}/f"), "exec:sleep 100".into(), format!("file:{dir}/f")] {
        let mut out = connect(&text.parse().unwrap(), &options, &stop).unwrap();
        out.send(&[SendPart::Own(b"bytes")], &stop).unwrap();
        let _ = out.finish(&stop);
    }
    for text in [format!("exec:cat {dir}/f"), "exec:exit 4".into(), format!("file:{dir}/f")] {
        let mut listener = Listener::bind(&text.parse().unwrap(), AllowList::default(), &stop).unwrap();
        let mut back = listener.accept(&options, &stop).unwrap();
        let _ = back.recv(&mut [RecvPart::Own(&mut [0; 9])], &stop);
    }
    for text in ["tcp:127.0.0.1:1", "unix:/none", "file:/none/f", "fd:999"] {
        assert!(connect(&text.parse().unwrap(), &options, &stop).is_err());
    }
}

#[test]
fn no_descriptor_and_no_child_is_left() {
    let dir = tempfile::tempdir().unwrap();
    use_every_scheme(dir.path());
    let before = open_descriptors();
    for _ in 0..5 {
        use_every_scheme(dir.path());
    }
    // The resolver's thread closes its end of a pipe shortly after its answer.
    let until = Instant::now() + Duration::from_secs(10);
    while open_descriptors() != before {
        assert!(Instant::now() < until, "{} descriptors, {before} before", open_descriptors());
        std::thread::sleep(Duration::from_millis(5));
    }
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    assert_eq!(children.trim(), "");
}
