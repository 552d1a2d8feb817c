//! A receiver whose source can not be told, a relay without progress, and the size of a guardian.

use super::*;

/// A QEMU that gets no answer resumes its guest: until it has received one the folder must not be `whole`.
#[test]
fn a_receiver_whose_source_can_not_be_told_leaves_its_guest_in_doubt() {
    for told in [true, false] {
        let dir = scratch();
        let (socket, folder) = (dir.path().join("socket"), dir.path().join("guest"));
        let uri = format!("unix:{}", socket.display());
        let receive = ["receive", &uri, "--json", "--dir"];
        let mut receiver = crate::common::ramwire::Ramwire::start(dir.path(), &receive, &folder);
        receiver.listening();
        let mut source = UnixStream::connect(&socket).unwrap();
        if !told {
            // Before the last byte: the answer may follow immediately.
            source.shutdown(std::net::Shutdown::Read).unwrap();
        }
        source.write_all(&[setup_of(false), round(), end(true)].concat()).unwrap();
        if !told {
            drop(source);
            let report = receiver.finished(Deadline::seconds(60), 5);
            assert_eq!(
                (&report["arrived"], &report["state"]),
                (&true.into(), &"in-doubt".into()),
                "{report}"
            );
            assert_eq!(state_or_none(&folder), "in-doubt");
            continue;
        }
        let mut answer = Vec::new();
        source.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, shut(0));
        receiver.finished(Deadline::seconds(60), 0);
        assert_eq!(state_or_none(&folder), "whole");
    }
}

/// Its source writes as much as allowed, round after round, and never ends.
#[test]
fn a_relay_whose_rounds_bring_nothing_says_so_and_that_its_source_decides() {
    let dir = scratch();
    let mut relayed = Relayed::start(dir.path(), Output::File, &[]);
    let mut far = relayed.far.try_clone().unwrap();
    let reads = std::thread::spawn(move || std::io::copy(&mut far, &mut std::io::sink()));
    let says = "the migration does not converge";
    Deadline::seconds(120).poll(
        says,
        || relayed.said(),
        || {
            (&relayed.source).write_all(&round()).unwrap();
            relayed.said().contains(says).then_some(())
        },
    );
    let said = relayed.said();
    assert!(said.contains("its source decides when to switch over") && said.contains("--timeout"), "{said}");
    relayed.signal(Signal::TERM);
    assert_eq!(relayed.status(), Some(4), "{}", relayed.said());
    let _ = reads.join().unwrap();
}

#[test]
fn a_guardian_is_small() {
    let dir = scratch();
    let relayed = Relayed::start(dir.path(), Output::File, &[]);
    let status = fs::read_to_string(format!("/proc/{}/status", relayed.guardian)).unwrap();
    let kib = |field: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        value.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let (data, stack, own) = (kib("VmData:"), kib("VmStk:"), kib("RssAnon:"));
    println!("{data} KiB of data, {stack} KiB of stack; {own} KiB of its own, {} KiB in all", kib("VmRSS:"));
    assert!(data + stack < 1024, "{status}");
    // Includes the loader's relocations, which grow with the program: 700 KiB for an unoptimised one.
    assert!(own < 2048, "{status}");
}
