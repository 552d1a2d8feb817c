//! Which items an incoming stream may have when, by numbered requirement.

#![allow(clippy::unwrap_used)]

mod bytes;

use super::super::super::error::{Corrupt, DecodeError, Fault};
use super::super::super::xbzrle::XbzrleFault;
use super::super::blocks::{BlockAnnouncement, encode_block_list};
use super::super::command::{Command, encode_discards};
use super::super::file::{Configuration, encode_configuration, encode_header};
use super::super::ram::{EOS_RECORD, IDSTR, PageAt, Record};
use super::super::section::{self, Phase, SectionName};
use super::*;
use crate::ram::BlockName;
use crate::units::{BlockIndex, BlockOffset, GuestAddr};
use bytes::{Bytes, Told, at, block, run_with};

const RAM: u32 = 0x77;
const PAGE: usize = 4096;

/// Name of the case, a valid beginning, what is appended to it, and the fault with its offset in the appended bytes.
type Case = (&'static str, Bytes, Box<dyn FnOnce(Bytes) -> Bytes>, (u64, Fault));

fn run(bytes: &Bytes) -> Result<(Told, IncomingStream), Corrupt> {
    run_with(IncomingConfig::default(), &bytes.0)
}

fn trace(bytes: &Bytes) -> String {
    run(bytes).unwrap().0.trace.join(", ")
}

/// The fault that the last piece added to `before` causes, and its offset inside that piece.
fn fault_after(before: Bytes, add: impl FnOnce(Bytes) -> Bytes) -> (u64, Fault) {
    let len = before.0.len() as u64;
    run(&before).unwrap();
    let corrupt = run(&add(before)).unwrap_err();
    assert!(corrupt.at >= len, "{corrupt}");
    (corrupt.at - len, corrupt.fault)
}

#[test]
fn s02_s06_s17_s24_a_plain_stream_is_told_in_order() {
    let stream = Bytes::started()
        .part()
        .zero(Some("ram"), 0)
        .record(Record::Page(at(None, 0x3000)))
        .raw(&[7; PAGE])
        .eos()
        .command(Command::SwitchoverStart)
        .end()
        .zero(None, 0x1000)
        .zero(Some("vga"), 0)
        .eos()
        .devices();
    let (told, machine) = run(&stream).unwrap();
    let want = "none, Start Ram, blocks 2, EOS, end, Part Ram, zero 0:0x0, page 0:0x3000, EOS, end, \
                SWITCHOVER_START, End Ram, zero 0:0x1000, zero 1:0x0, EOS, end, tail 94";
    assert_eq!((told.trace.join(", ").as_str(), told.done), (want, true));
    let seen = *machine.seen();
    assert!(seen.switchover_start && seen.ram_end && seen.barrier_in_start == Some(false));
    assert_eq!(machine.position(), stream.0.len() as u64);
    assert_eq!(machine.finish(), Ok(Ending::Whole));
    assert_eq!(machine.tail().bytes().len(), 94);
}

#[test]
fn s08_s09_s10_s19_s22_sections_out_of_place_are_refused() {
    let id = |id| Fault::UnknownSection { id };
    let unknown = |idstr: &str| Fault::UnknownIterable { idstr: idstr.into(), instance: 0 };
    let order = |what, why| Fault::OutOfOrder { what, why };
    #[rustfmt::skip]
    let cases: Vec<Case> = vec![
        ("PART before START",     Bytes::new(),     Box::new(Bytes::part),                                 (1, id(RAM))),
        ("PART of another id",    Bytes::started(), Box::new(|b| b.raw(b"\x02\0\0\0\x02")),                (1, id(2))),
        ("unknown iterable",      Bytes::started(), Box::new(|b| b.head(Phase::Start, 5, "0000:01/vfio", 1)), (0, unknown("0000:01/vfio"))),
        ("block migration",       Bytes::new(),     Box::new(|b| b.head(Phase::Start, 5, "block", 1)),     (0, unknown("block"))),
        ("unknown early device",  Bytes::started(), Box::new(|b| b.head(Phase::Full, 5, "timer", 2)),      (0, unknown("timer"))),
        ("device before RAM",     Bytes::new(),     Box::new(|b| b.head(Phase::Full, 5, "timer", 2)),      (0, unknown("timer"))),
        ("ram version 3",         Bytes::new(),     Box::new(|b| b.head(Phase::Start, 5, "ram", 3)),       (13, Fault::Version { name: "ram".into(), found: 3, supported: 4 })),
        ("an id twice",           Bytes::started(), Box::new(|b| b.head(Phase::Start, RAM, "dirty-bitmap", 1)), (1, Fault::SectionIdTaken { id: RAM })),
        ("no footer",             Bytes::started(), Box::new(|b| b.part().raw(&EOS_RECORD).raw(b"\x02")),  (13, Fault::NoFooter { id: RAM, found: 2 })),
        ("another's footer",      Bytes::started(), Box::new(|b| b.part().raw(&EOS_RECORD).footer(1)),     (14, Fault::Footer { id: RAM, found: 1 })),
        ("a description early",   Bytes::started(), Box::new(|b| b.raw(b"\x06\0\0\0\x02{}")),              (0, Fault::Item { found: 6 })),
        ("an unknown item",       Bytes::started(), Box::new(|b| b.raw(b"\x55")),                          (0, Fault::Item { found: 0x55 })),
        ("the end before RAM",    Bytes::new(),     Box::new(|b| b.raw(b"\0")),                            (0, order("the end of the stream", "RAM has not been announced"))),
        ("PART after END",        Bytes::started().end().eos(), Box::new(Bytes::part),                     (0, order("a ram section", "ram END has come"))),
        ("START after END",       Bytes::started().end().eos(), Box::new(Bytes::start),                    (0, order("START", "RAM is complete or the guest has moved"))),
    ];
    for (what, before, add, want) in cases {
        assert_eq!(fault_after(before, add), want, "{what}");
    }
}

#[test]
fn s24_s25_s26_s33_records_out_of_place_are_refused() {
    let outside = |block: &str, offset, used_length| Fault::OutsideBlock {
        block: block.into(),
        offset: BlockOffset(offset),
        used_length,
    };
    let part = || Bytes::started().part();
    let named = || part().zero(Some("ram"), 0);
    #[rustfmt::skip]
    let cases: Vec<Case> = vec![
        ("no block named",        part(),  Box::new(|b| b.zero(None, 0)),                                      (0, Fault::NoCurrentBlock)),
        ("unknown block",         part(),  Box::new(|b| b.zero(Some("pc.ram"), 0)),                            (0, Fault::UnknownBlock { name: "pc.ram".into() })),
        ("behind the block",      named(), Box::new(|b| b.zero(None, 0x4000)),                                 (0, outside("ram", 0x4000, 0x4000))),
        ("behind the other",      named(), Box::new(|b| b.zero(Some("vga"), 0x1000)),                          (0, outside("vga", 0x1000, 0x1000))),
        ("near 2^64",             named(), Box::new(|b| b.zero(None, u64::MAX - 0xfff)),                       (0, outside("ram", u64::MAX - 0xfff, 0x4000))),
        ("a whole page behind",   named(), Box::new(|b| b.record(Record::Page(at(None, 0x4000))).raw(&[0; PAGE])), (0, outside("ram", 0x4000, 0x4000))),
        ("a fill byte",           named(), Box::new(|b| b.record(Record::Zero { at: at(None, 0), fill: 9 })),  (8, Fault::FillByte { byte: 9 })),
        ("an RDMA mark",          named(), Box::new(|b| b.record(Record::Hook { argument: 0 })),               (0, Fault::RecordFlags { flags: 0x80 })),
        ("obsolete FULL",         named(), Box::new(|b| b.raw(b"\0\0\0\0\0\0\0\x01")),                         (0, Fault::RecordFlags { flags: 1 })),
        ("XBZRLE encoding 2",     named(), Box::new(|b| b.raw(b"\0\0\0\0\0\0\0\x60\x02")),                     (8, Fault::Xbzrle(XbzrleFault::Encoding { found: 2 }))),
    ];
    for (what, before, add, want) in cases {
        assert_eq!(fault_after(before, add), want, "{what}");
    }
    let config = IncomingConfig { accept_fill: true, accept_hooks: true, ..IncomingConfig::default() };
    let stream =
        named().record(Record::Zero { at: at(None, 0), fill: 9 }).record(Record::Hook { argument: 0 });
    let (told, _) = run_with(config, &stream.0).unwrap();
    assert_eq!(told.trace[told.trace.len() - 2..], ["fill 0:0x0 9", "Hook { argument: 0 }"]);
}

#[test]
fn s28_s29_s30_s79_block_lists_are_bounded_and_may_not_change() {
    fn total(bytes: u64) -> Record<'static> {
        Record::MemSize { total: bytes }
    }
    let start = || Bytes::new().start();
    let length = |length, why| Fault::BlockLength { name: "ram".into(), length, why };
    let over = "the blocks are longer than the announced total";
    #[rustfmt::skip]
    let cases: Vec<Case> = vec![
        ("a block twice",     start(), Box::new(|b| b.list(&[block("a", 1), block("a", 1)])),                    (18, Fault::DuplicateBlock { name: "a".into() })),
        ("over the total",    start(), Box::new(|b| b.record(total(4096)).raw(b"\x03ram\0\0\0\0\0\0\x20\0")),    (12, length(8192, over))),
        ("an empty block",    start(), Box::new(|b| b.record(total(4096)).raw(b"\x03ram\0\0\0\0\0\0\0\0")),      (12, length(0, "a block cannot be empty"))),
        ("half a page",       start(), Box::new(|b| b.record(total(4096)).raw(b"\x03ram\0\0\0\0\0\0\x08\0")),    (12, length(2048, "no multiple of the target page size"))),
        ("too much RAM",      start(), Box::new(move |b| b.record(total(1 << 50))),                              (0, Fault::TooMuchRam { announced: 1 << 50, limit: 64 << 40 })),
        ("another list",      Bytes::started().part(), Box::new(|b| b.list(&[block("ram", 4)])),                 (8 + 12, Fault::BlockListChanged)),
    ];
    for (what, before, add, want) in cases {
        assert_eq!(fault_after(before, add), want, "{what}");
    }
    let many: Vec<_> = (0..4097).map(|i| block(&format!("b{i:04}"), 1)).collect();
    let error = run(&start().list(&many)).unwrap_err();
    assert_eq!(error.fault, Fault::Limit { what: "the number of RAM blocks", value: 4097, limit: 4096 });

    let again = Bytes::started().part().list(&[block("ram", 4), block("vga", 1)]).eos();
    assert!(trace(&again).ends_with("Part Ram, blocks 2, EOS, end"), "the same list again is accepted");
    let shared = Configuration { capabilities: vec!["x-ignore-shared".into()], ..Configuration::default() };
    let addressed = BlockAnnouncement { guest_addr: Some(GuestAddr(0xc_0000)), ..block("ram", 1) };
    let (_, machine) = run(&Bytes::of(&shared).start().list(std::slice::from_ref(&addressed)).eos()).unwrap();
    assert_eq!(machine.blocks().as_slice(), [addressed]);
    assert_eq!(machine.blocks().find("ram"), Some(BlockIndex(0)));
}

#[test]
fn s04_s56_configuration_and_advice_must_fit() {
    let odd = Configuration { capabilities: vec!["x-colo".into()], ..Configuration::default() };
    assert_eq!(run(&Bytes::of(&odd)).map(|_| ()), Ok(()), "the next item is not here yet");
    let error = run(&Bytes::of(&odd).raw(b"\x08")).unwrap_err();
    assert_eq!(error, Corrupt { at: 8, fault: Fault::Capability { name: "x-colo".into() } });

    let big = PageSize::from_bytes(65536);
    let arm = Bytes::of(&Configuration { page_size: big, ..Configuration::default() }).raw(b"\x08");
    assert_eq!(run(&arm).unwrap_err().fault, Fault::TargetPage { found: 65536, expected: 4096 });
    let config = IncomingConfig { adopt_page_size: true, ..IncomingConfig::default() };
    assert_eq!(Some(run_with(config, &arm.0).unwrap().1.page_size()), big);

    let advise = |target_page| Command::PostcopyAdvise { host_pages: 0x1000, target_page };
    let (_, fault) = fault_after(Bytes::new(), |b| b.command(advise(65536)));
    assert_eq!(fault, Fault::TargetPage { found: 65536, expected: 4096 });
    let (_, fault) = fault_after(Bytes::started(), |b| b.command(advise(4096)));
    assert_eq!(fault, Fault::OutOfOrder { what: "POSTCOPY_ADVISE", why: "RAM has started" });

    let huge = BlockAnnouncement { host_page: Some(PageSize::SIZE_2M), ..block("huge", 512) };
    let blocks = [block("ram", 1), huge, block("vga", 1)];
    let stream = Bytes::new().command(advise(4096)).start().list(&blocks).eos();
    assert_eq!(run(&stream).unwrap().1.blocks().as_slice(), blocks, "a huge block among plain ones");
}

#[test]
fn s11_s12_s14_commands_out_of_place_are_refused() {
    let ping = Fault::OutOfOrder { what: "PING", why: "the return path has not been opened" };
    assert_eq!(
        fault_after(Bytes::new().command(Command::EnableColo), |b| b.command(Command::Ping(1))),
        (0, ping)
    );
    let twice = Bytes::new().command(Command::OpenReturnPath).command(Command::OpenReturnPath);
    assert_eq!(trace(&twice.command(Command::Ping(1))), "none, OPEN_RETURN_PATH, OPEN_RETURN_PATH, PING");
    let switchover = Bytes::started().command(Command::SwitchoverStart).command(Command::SwitchoverStart);
    assert!(trace(&switchover).ends_with("SWITCHOVER_START, SWITCHOVER_START"));
    let (_, fault) = fault_after(Bytes::started(), |b| b.raw(b"\x08\0\x0c\0\0"));
    assert_eq!(fault, Fault::Command { number: 12 });
}

#[test]
fn s16_s20_sections_beside_ram_are_passed_over_exactly() {
    let mut mem = Vec::new();
    for word in [0x1_0000_0000u64, 128 << 20, 1 << 20] {
        mem.extend_from_slice(&word.to_be_bytes());
    }
    mem.extend_from_slice(&[0; 12]);
    let stream = Bytes::started()
        .head(Phase::Full, 4, "0000:00:01.0/virtio-mem-device-early", 1)
        .raw(&mem)
        .raw(&[0x7e; 16])
        .footer(4)
        .part()
        .zero(Some("ram"), 0)
        .eos();
    let told = trace(&stream);
    assert!(told.contains("Full EarlyVirtioMem, VirtioMem"), "{told}");
    assert!(told.ends_with("bytes 16, end, Part Ram, zero 0:0x0, EOS, end"), "{told}");

    let bitmap = |id: u32| id.to_be_bytes();
    let stream = Bytes::started()
        .head(Phase::Start, 5, "dirty-bitmap", 1)
        .raw(b"\x1c\x01n\x01b\0\x01\0\0\x03\x01")
        .footer(5)
        .raw(b"\x02")
        .raw(&bitmap(5))
        .raw(b"\x40\0\0\0\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x03\x7e\x7e\x7e\x01")
        .footer(5)
        .end()
        .eos()
        .raw(b"\x03")
        .raw(&bitmap(5))
        .raw(b"\x21")
        .footer(5)
        .devices();
    let (told, machine) = run(&stream).unwrap();
    let text = told.trace.join(", ");
    assert!(
        text.contains("Part DirtyBitmap, BitmapChunk, bytes 3, BitmapChunk, end, End Ram, EOS, end"),
        "{text}"
    );
    assert!(told.done && machine.finish() == Ok(Ending::Whole), "{text}");
}

#[test]
fn s15_s76_streams_may_end_without_end_or_description() {
    let snapshot = Bytes::started().part().zero(Some("ram"), 0).eos().devices();
    let (told, machine) = run(&snapshot).unwrap();
    assert!(told.done && !machine.seen().ram_end);

    let described = Bytes::started().end().eos().devices();
    let json = described.0.iter().position(|byte| *byte == b'{').unwrap();
    let (told, machine) = run(&Bytes(described.0[..json - 5].to_vec())).unwrap();
    assert!(!told.done);
    assert_eq!(machine.finish(), Ok(Ending::NoDescription));

    let bare = Bytes::started().end().eos().raw(b"\0");
    let (told, machine) = run(&bare).unwrap();
    assert_eq!((told.trace.last().unwrap().as_str(), machine.finish()), ("Eof", Ok(Ending::NoDescription)));
    let (told, machine) =
        run(&bare.item(|out| section::encode_vm_description(b"{\"devices\": []}", out))).unwrap();
    assert_eq!((told.done, machine.finish()), (true, Ok(Ending::Whole)));
}

#[test]
fn s13_s58_s61_s79_a_package_is_bounded_and_only_plain_pages_follow_it() {
    let advised = || {
        let advise = Command::PostcopyAdvise { host_pages: 0x1000, target_page: 4096 };
        let before = Bytes::new().command(Command::OpenReturnPath).command(advise);
        before.start().list(&[block("ram", 4)]).eos()
    };
    let (_, fault) = fault_after(Bytes::started(), |b| b.command(Command::Packaged { size: 1 }));
    assert!(matches!(fault, Fault::OutOfOrder { what: "PACKAGED", .. }));
    let found = fault_after(advised(), |b| b.command(Command::Packaged { size: (1 << 30) + 1 }));
    let limit = Fault::Limit { what: "the length of the package", value: (1 << 30) + 1, limit: 1 << 30 };
    assert_eq!(found, (5, limit));

    let moved = || {
        let before = advised().item(|out| encode_discards("ram", &[(0, 0x4000)], out));
        before.command(Command::Packaged { size: 6 }).raw(b"\x04whole").command(Command::Ping(4)).part()
    };
    let whole = moved().zero(Some("ram"), 0).eos().end().eos().raw(b"\0");
    let (told, machine) = run(&whole).unwrap();
    let text = told.trace.join(", ");
    assert!(
        text.contains("PackageEnd, PING, Part Ram, zero 0:0x0, EOS, end, End Ram, EOS, end, Eof"),
        "{text}"
    );
    assert!(told.done && machine.finish() == Ok(Ending::Whole));
    // Whether page channels carry missing pages is the session's to know.
    let barrier = moved().record(Record::MultifdFlush).zero(Some("ram"), 0).eos().end().eos().raw(b"\0");
    assert!(run(&barrier).unwrap().0.done);
    for record in [Record::Xbzrle { at: at(Some("ram"), 0), len: 0 }, Record::MemSize { total: 0 }] {
        let (_, fault) = fault_after(moved(), |b| b.record(record));
        assert!(matches!(fault, Fault::OutOfOrder { what: "this RAM record", .. }), "{record:?}: {fault}");
    }
}

#[test]
fn s71_pages_of_a_mapped_file_do_not_come_in_records() {
    let mapped = Configuration { capabilities: vec!["mapped-ram".into()], ..Configuration::default() };
    let started = || Bytes::of(&mapped).start().record(Record::MemSize { total: 0 }).eos().part();
    for record in [
        Record::Page(at(Some("ram"), 0)),
        Record::Zero { at: at(Some("ram"), 0), fill: 0 },
        Record::Xbzrle { at: at(Some("ram"), 0), len: 0 },
        Record::Hook { argument: 0 },
        Record::MultifdFlush,
    ] {
        let (at, fault) = fault_after(started(), |b| b.record(record));
        assert!(
            at == 0 && matches!(fault, Fault::OutOfOrder { what: "a RAM record", .. }),
            "{record:?}: {fault}"
        );
    }
}

#[test]
fn s79_device_state_above_its_limit_is_refused() {
    let limits = StreamLimits { tail_bytes: 10, ..StreamLimits::default() };
    let config = IncomingConfig { limits, ..IncomingConfig::default() };
    let error = run_with(config, &Bytes::started().end().eos().devices().0).unwrap_err();
    assert!(matches!(error.fault, Fault::Limit { what: "the length of the device state", limit: 10, .. }));
}
