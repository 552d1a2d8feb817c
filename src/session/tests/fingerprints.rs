//! Fingerprints between two ramwires over real connections.

use super::*;
use crate::sys::random_id;
use crate::transport::{AllowList, ChannelOptions, ConnectionOptions, Listener, open_source};

const PAGES: u64 = 700;

/// Writes to its memory when it is paused, and no dirty source reports it.
struct Sly {
    machine: Machine,
    memory: Arc<MappedGuest>,
    page: Option<u64>,
}

impl GuestControl for Sly {
    fn pause(&mut self) -> io::Result<()> {
        if let Some(page) = self.page {
            let span = self.memory.region(BlockIndex(1)).unwrap().span(page * 4096, 4096).unwrap();
            span.copy_from(b"lost");
        }
        self.machine.pause()
    }

    fn resume(&mut self) -> io::Result<()> {
        self.machine.resume()
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        self.machine.devices()
    }
}

fn memory(file: bool, seed: u8) -> Arc<MappedGuest> {
    let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
    for (name, pages) in [("small", 3), ("ram", PAGES)] {
        let make = if file { |len| Mapping::memfd("ram", len) } else { Mapping::anonymous };
        let mapping = make(pages * 4096).unwrap();
        builder = builder.mapping(RamBlock::new(BlockName::new(name).unwrap(), pages * 4096), &mapping);
    }
    let guest = Arc::new(builder.build().unwrap());
    for page in (0..PAGES).filter(|page| seed > 0 && page % 5 != 0) {
        let span = guest.region(BlockIndex(1)).unwrap().span(page * 4096, 4096).unwrap();
        span.copy_from(&[page as u8 ^ seed | 1; 4096]);
    }
    guest
}

/// A migration to its end, with fingerprints. `sly`: the page that is written unnoticed.
fn migrate(channels: u8, file: bool, sly: Option<u64>) -> (SourceReport, DestinationReport) {
    let stop = Stop::never();
    let (from, to) = (memory(file, 7), memory(file, 0));
    let channels = ChannelOptions { count: channels, ..ChannelOptions::default() };
    let options = ConnectionOptions { channels, ..ConnectionOptions::default() };
    let at = "tcp:127.0.0.1:0".parse().unwrap();
    let mut listener = Listener::bind(&at, AllowList::default(), &stop).unwrap();
    let connection = open_source(listener.address(), from.clone(), &options, &stop).unwrap();
    let machine = Machine::running(b"devices");
    let control = Box::new(Sly { machine, memory: from.clone(), page: sly });
    let guest = SourceGuest { memory: from.clone(), dirty: Vec::new(), control };
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    (settings.migration_id, settings.guest_is_paused) = (random_id(), true);
    settings.verify = Verify::Fast;
    let source = SourceSession::new(guest, connection, settings).spawn().unwrap();
    let connection = listener.accept_connection(&options, &stop).unwrap();
    let machine = Machine::default();
    let arriving = DestinationSession::new(
        DestinationGuest { memory: Box::new(to.clone()), control: Box::new(machine.clone()) },
        connection,
        DestinationSettings::default(),
    );
    let arrived = arriving.run();
    let sent = source.wait().unwrap();
    assert!(machine.runs(), "{:?} {:?}", sent.error, arrived.error);
    assert_eq!(bytes(&from, 1) == bytes(&to, 1), sly.is_none());
    (sent, arrived)
}

#[test]
fn all_pages_are_compared_before_the_guest_is_handed_over_and_the_sources_memory_behind_it() {
    for (channels, file) in [(0, false), (0, true), (2, false), (2, true)] {
        let (sent, arrived) = migrate(channels, file, None);
        assert!(sent.error.is_none() && arrived.error.is_none(), "{:?} {:?}", sent.error, arrived.error);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(arrived.verified, "{channels} channels, file {file}");
        let equal = Some(MemoryCheck::Equal { pages: PAGES + 3 });
        assert_eq!((&sent.memory_check, &arrived.memory_check), (&equal, &equal));
        assert_eq!(arrived.bytes, sent.statistics.transferred);
    }
}

/// The migration is complete, and both ends report the difference.
#[test]
fn a_write_that_no_dirty_source_told_of_is_found_behind_the_hand_over() {
    for (channels, page) in [(0, 5), (2, 399)] {
        let (sent, arrived) = migrate(channels, false, Some(page));
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running));
        assert!(arrived.verified, "what was sent is there");
        let differs = MemoryCheck::Differs {
            block: BlockName::new("ram").unwrap(),
            from: BlockOffset(page * 4096),
            to: (page + 1) * 4096,
            pages: 1,
        };
        let text = differs.to_string();
        let differs = Some(differs);
        assert_eq!((&sent.memory_check, &arrived.memory_check), (&differs, &differs));
        assert!(
            text.contains("RAM block ram between") && text.contains(&format!("{:#x}", (page + 1) * 4096)),
            "{text}"
        );
    }
}
