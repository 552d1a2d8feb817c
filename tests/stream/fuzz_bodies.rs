//! Bodies of the fuzz targets. Plain functions, so that the captures and their mutations run as tests too.
//!
//! Not crashing is not enough: every decoded value must encode back to the same bytes, a request for more bytes must be
//! correct, and the memory that a stream uses must stay in proportion to its length.

use ramwire::ram::BlockName;
use ramwire::stream::DecodeError;
use ramwire::stream::qemu::blocks::BlockAnnouncement;
use ramwire::stream::qemu::channel::{Channel, ChannelStep};
use ramwire::stream::qemu::colo::{ColoEvent, ColoStep, ColoStream};
use ramwire::stream::qemu::incoming::{AnnouncedBlocks, Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::multifd::Method;
use ramwire::stream::qemu::page_compression::PacketInflater;
use ramwire::stream::qemu::{command, ram, return_path};
use ramwire::stream::xbzrle;
use ramwire::units::PageSize;

/// One RAM record.
pub(crate) fn record(data: &[u8]) {
    match ram::decode_record(data, PageSize::SIZE_4K) {
        Ok((record, used)) => {
            let mut again = Vec::new();
            record.encode(&mut again);
            // Two records are accepted with any offset, and written with zero.
            if !matches!(record, ram::Record::Eos | ram::Record::MultifdFlush) {
                assert_eq!(again, &data[..used], "{record:?}");
            }
        }
        Err(error) => honest(&error, data),
    }
}

/// One command.
pub(crate) fn command(data: &[u8]) {
    match command::decode_command(data) {
        Ok((command, used)) => {
            let mut again = Vec::new();
            command.encode(&mut again);
            assert_eq!(again, &data[..used], "{command:?}");
        }
        Err(error) => honest(&error, data),
    }
}

/// One message of the return path.
pub(crate) fn message(data: &[u8]) {
    match return_path::decode_message(data) {
        Ok((message, used)) => {
            let mut again = Vec::new();
            message.encode(&mut again);
            assert_eq!(again, &data[..used], "{message:?}");
        }
        Err(error) => honest(&error, data),
    }
}

/// One XBZRLE page: the decoder never writes outside the page, and agrees with a plain implementation of the rules.
pub(crate) fn xbzrle_page(data: &[u8]) {
    const PAGE: usize = 4096;
    let mut room = [0xa5; 3 * PAGE];
    let decoded = xbzrle::decode(data, &mut room[PAGE..2 * PAGE]);
    assert!(room[..PAGE].iter().chain(&room[2 * PAGE..]).all(|byte| *byte == 0xa5), "outside the page");
    let model = plain_xbzrle(data, vec![0xa5; PAGE]);
    assert_eq!(decoded.is_ok(), model.is_some(), "{decoded:?}");
    assert!(model.is_none_or(|page| page[..] == room[PAGE..2 * PAGE]));
}

/// The decoder's rules, a byte at a time.
fn plain_xbzrle(data: &[u8], mut page: Vec<u8>) -> Option<Vec<u8>> {
    let (mut from, mut to) = (0, 0);
    let length = |from: &mut usize| {
        let (low, high) = (usize::from(*data.get(*from)?), usize::from(*data.get(*from + 1)?));
        if low < 0x80 {
            *from += 1;
            return Some(low);
        }
        *from += 2;
        (high < 0x80).then_some(low - 0x80 + high * 0x80)
    };
    while from < data.len() {
        let is_first = from == 0;
        let skip = length(&mut from)?;
        if skip == 0 && !is_first || to + skip > page.len() {
            return None;
        }
        to += skip;
        let count = length(&mut from)?;
        if count == 0 {
            return None;
        }
        for _ in 0..count {
            *page.get_mut(to)? = *data.get(from)?;
            (from, to) = (from + 1, to + 1);
        }
    }
    Some(page)
}

/// A whole stream. Returns how far it was parsed.
pub(crate) fn stream(data: &[u8]) -> usize {
    let mut stream = IncomingStream::new(IncomingConfig::default());
    let mut at = 0;
    loop {
        match stream.next(&data[at..]) {
            Ok(Step::Event { consumed, event }) => {
                check_event(&event, consumed, &stream);
                at += consumed;
                assert!(at <= data.len() && stream.position() == at as u64);
                if event == Event::Done {
                    break;
                }
            }
            Ok(Step::NeedMore { consumed, needed }) => {
                at += consumed;
                assert!(needed > data.len() - at, "asks for bytes it has");
                assert!(needed <= stream.max_needed(), "asks for {needed} bytes");
                break;
            }
            Err(DecodeError::Corrupt(corrupt)) => {
                assert!(corrupt.at >= stream.position() && corrupt.at <= data.len() as u64, "{corrupt}");
                break;
            }
            Err(DecodeError::Truncated { .. }) => panic!("truncation is no error of a stream"),
        }
    }
    assert!(stream.tail().bytes().len() <= data.len());
    at
}

/// A QEMU's stream with checkpoints behind it. Returns how many are whole.
pub(crate) fn checkpoints(data: &[u8]) -> usize {
    const MAX_STATE: u64 = 1 << 16;
    let mut stream = ColoStream::new(IncomingConfig::default(), MAX_STATE);
    let (mut at, mut whole, mut left) = (0, 0, None::<u64>);
    loop {
        match stream.next(&data[at..]) {
            Ok(ColoStep::Event { consumed, event }) => {
                at += consumed;
                assert!(at <= data.len() && stream.position() == at as u64);
                match event {
                    ColoEvent::Item(item) => {
                        assert!(left.is_none(), "an item inside device state: {item:?}");
                        check_event(&item, consumed, stream.items());
                    }
                    ColoEvent::Requested => assert!(whole > 0, "a checkpoint before the first migration"),
                    ColoEvent::StateBegins(len) => {
                        assert!(len <= MAX_STATE);
                        left = Some(len);
                    }
                    ColoEvent::State(bytes) => left = Some(left.unwrap() - bytes.len() as u64),
                    ColoEvent::Whole => {
                        assert!(left.take().unwrap_or(0) == 0, "whole without all of its state");
                        whole += 1;
                    }
                }
            }
            Ok(ColoStep::NeedMore { consumed, needed }) => {
                at += consumed;
                assert!(needed > data.len() - at, "asks for bytes it has");
                return whole;
            }
            Err(DecodeError::Corrupt(corrupt)) => {
                assert!(corrupt.at >= stream.position() && corrupt.at <= data.len() as u64, "{corrupt}");
                return whole;
            }
            Err(DecodeError::Truncated { .. }) => panic!("truncation is no error of a stream"),
        }
    }
}

fn check_event(event: &Event<'_>, consumed: usize, stream: &IncomingStream) {
    match event {
        Event::Page { block, offset, bytes } => {
            let announced = &stream.blocks().as_slice()[block.as_usize()];
            assert!(offset.0 + bytes.len() as u64 <= announced.used_length && offset.0 % 4096 == 0);
            assert_eq!(bytes.len(), 4096);
        }
        Event::Zero { block, offset } | Event::Xbzrle { block, offset, .. } => {
            assert!(offset.0 < stream.blocks().as_slice()[block.as_usize()].used_length);
        }
        Event::Blocks(blocks) => assert!(blocks.len() <= 4096 && !blocks.iter().any(|b| b.used_length == 0)),
        Event::TailBytes(bytes) => assert_eq!(bytes.len(), consumed),
        _ => {}
    }
}

/// One multifd channel, between blocks of the captured guests.
pub(crate) fn channel(data: &[u8], method: Method) {
    let block = |name: &str, used_length| {
        let name = BlockName::new(name).unwrap();
        BlockAnnouncement { name, used_length, host_page: None, guest_addr: None }
    };
    let blocks =
        AnnouncedBlocks::new(vec![block("microvm.ram", 2 << 20), block("pc.bios", 64 << 10)]).unwrap();
    let mut channel = Channel::new(PageSize::SIZE_4K, method, Some([0; 16]), 2);
    let mut inflater = PacketInflater::new(method).unwrap();
    let mut at = 0;
    loop {
        match channel.next(&data[at..], &blocks) {
            Ok(ChannelStep::Opened { consumed, id }) => {
                assert!(id < 2);
                at += consumed;
            }
            Ok(ChannelStep::Barrier { consumed }) => {
                at += consumed;
                channel.release();
            }
            Ok(ChannelStep::Packet { consumed }) => {
                at += consumed;
                let plan = channel.packet();
                let used_length = blocks.as_slice()[plan.block.unwrap().as_usize()].used_length;
                assert!(plan.normal.len() + plan.zero.len() <= 128 && plan.payload <= 1 << 20);
                for offset in plan.normal.iter().chain(&plan.zero) {
                    assert!(offset.0 % 4096 == 0 && offset.0 + 4096 <= used_length);
                }
                let end = at + plan.payload as usize;
                let Some(payload) = data.get(at..end) else { return };
                if let Some(inflater) = &mut inflater
                    && !payload.is_empty()
                {
                    let mut pages = vec![0; plan.normal.len() * 4096];
                    if inflater.inflate(payload, &mut pages).is_err() {
                        return;
                    }
                }
                at = end;
                channel.payload_taken();
            }
            Ok(ChannelStep::NeedMore { consumed, needed }) => {
                assert!(needed > data.len() - at - consumed && needed <= 1344);
                return;
            }
            Err(DecodeError::Corrupt(corrupt)) => {
                assert!(corrupt.at >= at as u64 && corrupt.at <= data.len() as u64, "{corrupt}");
                return;
            }
            Err(DecodeError::Truncated { .. }) => panic!("truncation is no error of a channel"),
        }
    }
}

fn honest(error: &DecodeError, data: &[u8]) {
    match error {
        DecodeError::Truncated { needed, have } => {
            assert_eq!(*have, data.len());
            assert!(needed > have, "asks for bytes it has");
        }
        DecodeError::Corrupt(corrupt) => assert!(corrupt.at <= data.len() as u64, "{corrupt}"),
    }
}
