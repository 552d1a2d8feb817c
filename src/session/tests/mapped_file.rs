//! A guest that is saved to a mapped-ram file: it is complete at its source or in the file, or this is unknown.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use super::{Machine, bytes, guest};
use crate::engine::{Ending, Outcome};
use crate::guest::MappedGuest;
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::{CancelToken, Stop};
use crate::transport::{AllowList, ConnectionOptions, Listener, MappedLink, OpenError, SourceConnection};
use crate::units::BlockIndex;

const PAGES: u64 = 600;

fn saved(from: &Arc<MappedGuest>, path: &std::path::Path, step: i64) -> (SourceReport, Machine) {
    let machine = Machine::running(b"");
    let link = MappedLink::create(path, from.clone());
    link.break_at(step);
    let sent = SourceGuest { memory: from.clone(), dirty: Vec::new(), control: Box::new(machine.clone()) };
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    (SourceSession::new(sent, SourceConnection::new(Box::new(link), None), settings).run(), machine)
}

/// The content of the file, if it holds a complete guest.
fn loaded(path: &std::path::Path) -> Option<Vec<u8>> {
    let stop = Stop::on(&CancelToken::default());
    let address = format!("mapped:{}", path.display()).parse().unwrap();
    let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
    let connection = match listener.accept_connection(&ConnectionOptions::default(), &stop) {
        Err(OpenError::Unreadable { .. }) => return None,
        opened => opened.unwrap_or_else(|error| panic!("{error}")),
    };
    let to = guest(&[PAGES]);
    let machine = Machine::default();
    let arriving = DestinationGuest { memory: Box::new(to.clone()), control: Box::new(machine.clone()) };
    let report = DestinationSession::new(arriving, connection, DestinationSettings::default()).run();
    assert_eq!(report.ending, Ending::Running, "{:?}", report.error);
    assert!(machine.runs() && report.pages.normal > 0 && report.pages.zero > 0);
    Some(bytes(&to, 0))
}

/// All operations on the file fail from some step on, for each step of a save.
#[test]
fn a_guest_whose_save_fails_runs_on_and_no_file_claims_to_hold_it() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let path = dir.path().join("guest");
    let (mut stayed, mut doubted) = (0, 0);
    for step in 0.. {
        let from = guest(&[PAGES]);
        let region = from.region(BlockIndex(0)).unwrap();
        (0..PAGES).filter(|page| page % 5 != 0).for_each(|page| {
            region.span(page * 4096, 4096).unwrap().copy_from(&[page as u8 | 1; 4096]);
        });
        let (report, machine) = saved(&from, &path, step);
        let there = loaded(&path);
        match report.outcome {
            Outcome::Completed => {
                assert!(!machine.runs() && there.unwrap() == bytes(&from, 0));
                break;
            }
            Outcome::StaysHere(_) => {
                assert!(machine.runs(), "step {step}: it runs nowhere");
                assert!(there.is_none(), "step {step}: it runs here and is in the file");
                assert!(report.error.is_some() && report.guest_is_safe_here());
                stayed += 1;
            }
            Outcome::InDoubt => {
                assert!(!machine.runs(), "step {step}: it may be in the file");
                assert!(there.is_none_or(|there| there == bytes(&from, 0)));
                doubted += 1;
            }
            other => panic!("step {step}: {other:?}"),
        }
    }
    // The rest of the stream, its sync, the truncation, the first word and its sync.
    assert!(stayed >= 8 && doubted <= 6, "{stayed} stayed, {doubted} in doubt");
}
