//! Bodies of fuzz targets; also run as plain tests on seeded input.

use std::sync::Arc;
use std::time::Duration;

use rdma_hooks::capabilities::{Extension, Role};
use rdma_hooks::control::{Kind, Message};
use rdma_hooks::exchange::{Receiver, Sender, SenderEvent};
use rdma_hooks::sim::SparseMemory;
use rdma_hooks::{
    BlockSpan, Cancel, Capabilities, DestinationConfig, DestinationHooks, ExtensionOffer, Fabric, Features,
    HooksError, HostRegion, MigrationId, PageContent, RamBlock, RamControl, RegionMemory, SourceConfig,
    SourceHooks, Stop,
};

use super::scripted::Scripted;
use super::{MIB, PAGE};

/// Whatever decodes encodes to as many bytes that mean the same; nothing panics.
pub fn control(data: &[u8]) {
    if let Ok(message) = Message::decode(data) {
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(again.len(), data.len(), "{message:?}");
        assert_eq!(Message::decode(&again), Ok(message));
    }
}

/// The books of credits never go below zero or above the window, whatever arrives. The first byte is the window,
/// every other one an arrival or a wish.
pub fn exchange(data: &[u8]) {
    let Some((&window, steps)) = data.split_first() else { return };
    let window = u16::from(window % 5);
    let (mut sender, mut receiver) = (Sender::new(window), Receiver::new(window));
    let (mut unused, mut granted) = (0, 0);
    for &step in steps {
        let kind = Kind::from_wire(u32::from(step & 15)).unwrap_or(Kind::Done);
        if step & 0x80 != 0 {
            let sent = sender.send(kind).is_some();
            assert_eq!(sent, unused > 0);
            unused -= u16::from(sent);
            granted += u16::from(receiver.grant());
            assert!(granted <= window.max(1));
        } else {
            if let Ok(SenderEvent::Ready) = sender.on_arrival(kind) {
                unused += 1;
            }
            assert!(unused <= window.max(1));
            if receiver.on_arrival(kind).is_ok() {
                receiver.finish();
                granted -= 1;
            }
        }
    }
}

/// Cuts input into messages: two bytes of length (at most 512), then as many bytes.
pub fn messages(mut data: &[u8]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    while let Some((&[high, low], rest)) = data.split_first_chunk::<2>() {
        let len = usize::from(u16::from_be_bytes([high, low]) % 512).min(rest.len());
        let (message, rest) = rest.split_at(len);
        messages.push(message.to_vec());
        data = rest;
    }
    messages
}

/// How the scripted peer and the end under test agreed to talk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mode {
    pub pin_all: bool,
    /// Both ends are of this crate, with all that goes beyond QEMU.
    pub native: bool,
}

impl Mode {
    pub fn from_bits(bits: u8) -> Self {
        Self { pin_all: bits & 1 != 0, native: bits & 2 != 0 }
    }

    fn private_data(self) -> Vec<u8> {
        let offer = self.offer();
        let extension = offer.map(|ExtensionOffer { data_queues, window, features, migration }| Extension {
            role: Role::Main,
            data_queues,
            window,
            features,
            migration,
        });
        Capabilities { pin_all: self.pin_all, extension }.encode()
    }

    fn offer(self) -> Option<ExtensionOffer> {
        let migration = MigrationId([9; 16]);
        // One connection is all that it makes.
        let features = Features { reads: false, ..Features::ALL };
        let offer = ExtensionOffer { data_queues: 0, window: 1, features, migration };
        self.native.then_some(offer)
    }
}

/// A destination survives any source: it errs, keeps its registrations inside its blocks, and lets go of them all.
pub fn destination(mode: Mode, says: Vec<Vec<u8>>) -> Result<(), HooksError> {
    let scripted = Scripted::new(mode.private_data(), says);
    let script = Arc::clone(&scripted.script);
    let ended = serve(&scripted);
    let script = script.lock().unwrap();
    assert_eq!(script.registered, 0, "registrations leak");
    ended
}

fn serve(scripted: &Scripted) -> Result<(), HooksError> {
    let stop = Stop::new(Some(scripted.now() + Duration::from_secs(10)), Cancel::default());
    let mut listener = scripted.clone();
    let mut hooks = DestinationHooks::accept(&mut listener, &DestinationConfig::default(), &stop)?;
    let lengths = [12 * MIB + PAGE, PAGE];
    for (name, length) in ["ram", "rom"].into_iter().zip(lengths) {
        hooks.add_block(RamBlock::new(name, HostRegion::new(Arc::new(SparseMemory::new(length)))))?;
        hooks.block_notification(name, length)?;
    }
    let total: u64 = lengths.iter().sum();
    let limit = total * 4;
    loop {
        let served = hooks.registration_handle(&stop);
        let registered = scripted.script.lock().unwrap().registered;
        assert!(registered <= limit, "{registered} bytes registered");
        assert_eq!(hooks.registered_bytes(), registered, "the books are right");
        for (block, length) in lengths.iter().enumerate() {
            assert!(hooks.touched_chunks(block as u32).all(|chunk| chunk * MIB < *length));
        }
        served?;
    }
}

/// A source survives any destination: it errs, and sends nothing against the rules.
pub fn source(mode: Mode, says: Vec<Vec<u8>>) -> Result<(), HooksError> {
    let scripted = Scripted::new(mode.private_data(), says);
    let script = Arc::clone(&scripted.script);
    let ended = drive(&scripted, mode);
    let script = script.lock().unwrap();
    assert_eq!(script.registered, 0, "registrations leak");
    for write in script.writes.iter().filter(|write| write.len > 0) {
        assert!(u64::from(write.len) <= MIB && write.rkey != 0, "{write:?}");
    }
    ended
}

fn drive(scripted: &Scripted, mode: Mode) -> Result<(), HooksError> {
    let stop = Stop::new(Some(scripted.now() + Duration::from_secs(10)), Cancel::default());
    let config = SourceConfig {
        pin_all: mode.pin_all,
        pin_budget_bytes: Some(4 * MIB),
        extension: mode.offer(),
        ..SourceConfig::default()
    };
    let mut hooks = SourceHooks::connect(scripted, "script", 1, config, &stop)?;
    let memory = Arc::new(SparseMemory::new(3 * MIB));
    memory.write(MIB, b"data");
    hooks.set_blocks(vec![RamBlock::new("ram", HostRegion::new(memory))])?;
    for kind in [RamControl::Setup, RamControl::Round, RamControl::Finish] {
        if let Some(mark) = hooks.registration_start(kind)? {
            hooks.write_stream(&mark.to_bytes(), &stop)?;
        }
        if kind != RamControl::Setup {
            let pages = [
                (0, PageContent::Zero),
                (0, PageContent::Data),
                (2 * MIB, PageContent::Data),
                (MIB, PageContent::Unknown),
            ];
            let spans = pages.map(|(offset, content)| BlockSpan { block: 0, offset, len: MIB, content });
            hooks.expect_pages(&spans, &stop)?;
            for span in spans {
                hooks.control_save_page(span, &stop)?;
            }
        }
        hooks.registration_stop(kind, &stop)?;
        hooks.collect()?;
    }
    hooks.finish(&stop)?;
    Ok(())
}
