//! Bodies of the fuzz targets. Plain functions, so that the captures and their mutations run as tests too.
//!
//! Not crashing is the least of it: what decodes must encode back to the same bytes, a request for more bytes must be
//! honest, and what a stream makes us keep must stay in proportion to what it sent.

use ramwire::stream::DecodeError;
use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::{command, ram, return_path};
use ramwire::stream::xbzrle;
use ramwire::units::PageSize;

/// One RAM record.
pub(crate) fn record(data: &[u8]) {
    match ram::decode_record(data, PageSize::SIZE_4K) {
        Ok((record, used)) => {
            let mut again = Vec::new();
            record.encode(&mut again);
            // Two records are accepted whatever their offset says, and written with zero.
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

/// One XBZRLE page: never outside the page.
pub(crate) fn xbzrle_page(data: &[u8]) {
    let mut page = [0xa5; 4096];
    let _ = xbzrle::decode(data, &mut page);
}

/// A whole stream. Returns how far it was understood.
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
                assert!(needed <= stream.most_needed(), "asks for {needed} bytes");
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

fn honest(error: &DecodeError, data: &[u8]) {
    match error {
        DecodeError::Truncated { needed, have } => {
            assert_eq!(*have, data.len());
            assert!(needed > have, "asks for bytes it has");
        }
        DecodeError::Corrupt(corrupt) => assert!(corrupt.at <= data.len() as u64, "{corrupt}"),
    }
}
