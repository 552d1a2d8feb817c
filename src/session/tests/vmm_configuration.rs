//! Data that the source's VMM sends to the destination's before memory is provided.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};

use super::streams::{native_start, received};
use super::{Ends, ends_with, guest};
use crate::engine::{Ending, Outcome, Reason};
use crate::error::Chain;
use crate::guest::{GuestMemory, MappedGuest};
use crate::session::*;
use crate::stream::native::{MAX_CONFIGURATION_PART, Order};
use crate::stream::qemu::command::Command;

/// A VMM that provides memory according to the data of the other one.
struct Follows(Arc<MappedGuest>, Arc<Mutex<Option<Vec<u8>>>>);

impl MemoryProvider for Follows {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        *self.1.lock().unwrap() = Some(incoming.vmm_configuration.clone());
        self.0.provide(incoming)
    }
}

/// How a migration with `configuration` ended, and the data that the destination's VMM received.
fn told(
    configuration: &[u8],
    set: impl FnOnce(&mut Ends),
) -> (SourceReport, DestinationReport, Option<Vec<u8>>) {
    let mut ends = ends_with(|settings| settings.vmm_configuration = configuration.to_vec());
    let seen = Arc::default();
    ends.destination.arrive_in(Box::new(Follows(ends.to.clone(), Arc::clone(&seen))));
    set(&mut ends);
    let destination = std::thread::spawn(move || ends.destination.run());
    let sent = ends.source.run();
    let seen = || seen.lock().unwrap().clone();
    (sent, destination.join().unwrap(), seen())
}

#[test]
fn a_vmm_is_told_the_others_configuration_before_it_provides_memory() {
    let long: Vec<u8> = (0..3 * MAX_CONFIGURATION_PART + 5).map(|at| (at % 251) as u8).collect();
    for configuration in [&b""[..], b"{\"vcpus\": 4}", &long] {
        let (sent, arrived, seen) = told(configuration, |_| {});
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running), "{:?}", sent.error);
        assert_eq!(seen.as_deref(), Some(configuration));
        assert!(arrived.verified, "the digest covers it");
    }
}

#[test]
fn a_configuration_beyond_the_destinations_limit_ends_the_migration_before_a_page() {
    let (sent, arrived, seen) = told(&[7; 2000], |ends| ends.destination.settings_mut().max_state = 1999);
    assert_eq!((sent.outcome, arrived.ending), (Outcome::StaysHere(Reason::Failed), Ending::Discarded));
    let text = Chain(&arrived.error.unwrap()).to_string();
    assert!(text.contains("more VMM configuration than is accepted"), "{text}");
    assert_eq!((seen, sent.statistics.pages.normal), (None, 0));
}

#[test]
fn a_configuration_that_nobody_would_get_is_refused_before_the_first_byte() {
    type Set = fn(&mut Ends);
    let cases: [(&str, Set); 2] = [
        ("the destination is a QEMU", |ends| ends.source.settings_mut().peer = Some(Peer::Qemu)),
        ("the connection carries no answers", |ends| ends.source.hang_up()),
    ];
    for (why, set) in cases {
        let mut ends = ends_with(|settings| settings.vmm_configuration = vec![1]);
        ends.source.settings_mut().verify = Verify::Off;
        set(&mut ends);
        let sent = ends.source.run();
        let error = sent.error.unwrap();
        assert!(matches!(&error, Error::Config { what, .. } if what.contains(why)), "{error}");
        assert_eq!((sent.outcome, sent.statistics.transferred), (Outcome::StaysHere(Reason::Failed), 0));
    }
}

/// After the list of blocks it is too late for the memory, and before HELLO its sender is unknown.
#[test]
fn a_configuration_out_of_turn_is_refused() {
    let late = {
        let mut stream = native_start(&[("block0", 3)]);
        Command::Native(Order::VmmConfiguration { part: b"late" }).encode(&mut stream);
        stream
    };
    let (report, machine) = received(late, guest(&[3]));
    let text = Chain(&report.error.unwrap()).to_string();
    assert!(text.contains("VMM_CONFIGURATION"), "{text}");
    assert!(report.ending == Ending::Discarded && !machine.runs());
}
