//! Migrations into memory that was used before.
#![allow(clippy::unwrap_used)]

use std::io::{self, Read};
use std::sync::Arc;

use super::{Machine, bytes};
use crate::engine::{Ending, Outcome};
use crate::guest::{DeviceState, GuestControl, MappedGuest};
use crate::ram::{BlockName, RamBlock};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::{CancelToken, Mapping, Stop, random_id};
use crate::transport::{AllowList, ChannelOptions, ConnectionOptions, Listener, open_source};
use crate::units::{BlockIndex, PageSize};

const PAGES: u64 = 256;

/// A destination that can't load the device state: it discards the received pages.
struct Refuses;

impl GuestControl for Refuses {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Refuses {
    fn load(&mut self, _: &mut dyn Read) -> io::Result<()> {
        Err(io::Error::other("no such device"))
    }
}

fn guest(mapping: &Mapping) -> Arc<MappedGuest> {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), mapping.region().len());
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping).build().unwrap())
}

fn fill(guest: &MappedGuest, pages: std::ops::Range<u64>, value: u8) {
    let region = guest.region(BlockIndex(0)).unwrap();
    for page in pages {
        region.span(page * 4096, 4096).unwrap().copy_from(&[value; 4096]);
    }
}

/// Without a digest, and over one connection or with page channels.
fn migrate(
    (from, to): (&Arc<MappedGuest>, Box<dyn MemoryProvider>),
    channels: u8,
    control: Box<dyn GuestControl>,
) -> (SourceReport, DestinationReport) {
    let stop = Stop::on(&CancelToken::default());
    let channels = ChannelOptions { count: channels, ..ChannelOptions::default() };
    let options = ConnectionOptions { channels, ..ConnectionOptions::default() };
    let at = "tcp:127.0.0.1:0".parse().unwrap();
    let mut listener = Listener::bind(&at, AllowList::default(), &stop).unwrap();
    let connection = open_source(listener.address(), from.clone(), &options, &stop).unwrap();
    let guest =
        SourceGuest { memory: from.clone(), dirty: Vec::new(), control: Box::new(Machine::default()) };
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.migration_id = random_id();
    settings.guest_is_paused = true;
    let source = SourceSession::new(guest, connection, settings).spawn().unwrap();
    let connection = listener.accept_connection(&options, &stop).unwrap();
    let arriving = DestinationSession::new(
        DestinationGuest { memory: to, control },
        connection,
        DestinationSettings::default(),
    );
    let arrived = arriving.run();
    (source.wait().unwrap(), arrived)
}

#[test]
fn what_a_discarded_migration_left_is_zero_where_the_guest_is() {
    let memories = [Mapping::anonymous, |len| Mapping::memfd("ram", len)];
    for (make, channels) in memories.into_iter().flat_map(|make| [(make, 0), (make, 2)]) {
        let (source, target) = (make(PAGES * 4096).unwrap(), make(PAGES * 4096).unwrap());
        let (from, to) = (guest(&source), guest(&target));
        fill(&from, 0..PAGES, 7);
        let (sent, arrived) = migrate((&from, Box::new(to.clone())), channels, Box::new(Refuses));
        assert_eq!(arrived.ending, Ending::Discarded, "{:?}", arrived.error);
        assert!(matches!(sent.outcome, Outcome::StaysHere(_)), "{:?}", sent.error);
        assert_eq!(bytes(&to, 0)[0], 7, "what came is still there");
        fill(&from, 10..74, 0);
        let machine = Box::new(Machine::default());
        let (sent, arrived) = migrate((&from, Box::new(to.clone())), channels, machine);
        assert_eq!(arrived.ending, Ending::Running, "{:?} {:?}", arrived.error, sent.error);
        assert_eq!(arrived.pages.zero, 64);
        assert!(bytes(&from, 0) == bytes(&to, 0), "the guest has changed on its way");
    }
}

/// Whether the kernel is queried or the provider promises it: a page that was never written takes no memory.
#[test]
fn untouched_memory_stays_untouched() {
    for (promised, channels) in [(false, 0), (false, 2), (true, 0), (true, 2)] {
        let source = Mapping::memfd("ram", PAGES * 4096).unwrap();
        let target = Mapping::memfd("ram", PAGES * 4096).unwrap();
        let (from, to) = (guest(&source), guest(&target));
        fill(&from, 100..110, 7);
        let provider: Box<dyn MemoryProvider> =
            if promised { Box::new(Zeroed(to.clone())) } else { Box::new(to.clone()) };
        let (sent, arrived) = migrate((&from, provider), channels, Box::new(Machine::default()));
        assert_eq!(arrived.ending, Ending::Running, "{:?} {:?}", arrived.error, sent.error);
        assert_eq!((arrived.pages.normal, arrived.pages.zero), (10, PAGES - 10));
        let blocks = rustix::fs::fstat(target.backing().unwrap().0).unwrap().st_blocks;
        assert_eq!(blocks, 10 * 8, "promised: {promised}, {channels} channels");
    }
}
