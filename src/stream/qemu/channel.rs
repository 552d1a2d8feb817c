//! One incoming multifd channel: packets, pages and stops.

use super::super::error::{DecodeError, Fault};
use super::incoming::AnnouncedBlocks;
use super::multifd::{Init, Method, Packet, Pages, decode_init, decode_packet};
use super::packet_numbers::PacketNumbers;
use crate::units::{BlockIndex, BlockOffset, PageSize};

/// Parses one channel. The caller reads the bytes; the machine reports what they are and when to stop.
///
/// ```text
/// next -> Opened -> next -> Packet -> (caller takes payload bytes) payload_taken -> next -> ...
///                           Barrier -> (main reaches its barrier)  release       -> next -> ...
/// ```
///
/// Payload bytes never pass through here, so that the caller can read them from the socket into guest memory.
#[derive(Clone, Debug)]
pub struct Channel {
    page: PageSize,
    method: Method,
    uuid: Option<[u8; 16]>,
    channels: u8,
    state: State,
    /// Offset of the next unread byte.
    position: u64,
    id: Option<u8>,
    barriers: u64,
    numbers: PacketNumbers,
    plan: Plan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Init,
    Header,
    Payload { then_sync: bool },
    Barrier,
}

/// Where the pages of a packet go. All lie inside their block and on page boundaries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Their block; `None` before the first packet.
    pub block: Option<BlockIndex>,
    /// Pages whose bytes follow, in that order.
    pub normal: Vec<BlockOffset>,
    /// Pages to clear.
    pub zero: Vec<BlockOffset>,
    /// Bytes that follow: the normal pages, uncompressed or compressed.
    pub payload: u32,
}

/// What a channel does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelStep {
    /// The initial packet has arrived.
    Opened {
        /// Bytes taken.
        consumed: usize,
        /// Number of the channel.
        id: u8,
    },
    /// A packet with pages: process [`Channel::packet`], read its payload, then call [`Channel::payload_taken`].
    Packet {
        /// Bytes of the header, which have been taken. The payload follows.
        consumed: usize,
    },
    /// Stop reading until all channels are at a barrier and the main channel has reached its own; then call
    /// [`Channel::release`]. Returned again until then.
    Barrier {
        /// Bytes taken.
        consumed: usize,
    },
    /// The input holds only the beginning of a packet.
    NeedMore {
        /// Bytes that were consumed: empty packets.
        consumed: usize,
        /// Bytes that are needed, counted after those consumed.
        needed: usize,
    },
}

impl Channel {
    /// A channel before its first byte; `uuid` and `channels` are as for [`decode_init`].
    pub fn new(page: PageSize, method: Method, uuid: Option<[u8; 16]>, channels: u8) -> Self {
        let (state, plan, numbers) = (State::Init, Plan::default(), PacketNumbers::default());
        Self { page, method, uuid, channels, state, position: 0, id: None, barriers: 0, numbers, plan }
    }

    /// Takes the next packet's header from `input`, which begins at the first byte that was not consumed. Empty
    /// packets, which old senders send, are skipped.
    ///
    /// # Errors
    ///
    /// Only [`DecodeError::Corrupt`], with the offset from the start of the channel. If one channel fails, the whole
    /// migration fails: the caller must stop the others, too.
    pub fn next(&mut self, input: &[u8], blocks: &AnnouncedBlocks) -> Result<ChannelStep, DecodeError> {
        let mut consumed = 0;
        loop {
            let rest = input.get(consumed..).unwrap_or(&[]);
            match self.advance(rest, blocks) {
                Ok((used, told)) => {
                    consumed += used;
                    self.position += used as u64;
                    match told {
                        Some(Told::Opened(id)) => return Ok(ChannelStep::Opened { consumed, id }),
                        Some(Told::Packet) => return Ok(ChannelStep::Packet { consumed }),
                        Some(Told::Barrier) => return Ok(ChannelStep::Barrier { consumed }),
                        None => {}
                    }
                }
                Err(DecodeError::Truncated { needed, .. }) => {
                    return Ok(ChannelStep::NeedMore { consumed, needed });
                }
                Err(corrupt) => return Err(corrupt.based(self.position)),
            }
        }
    }

    fn advance(
        &mut self,
        input: &[u8],
        blocks: &AnnouncedBlocks,
    ) -> Result<(usize, Option<Told>), DecodeError> {
        match self.state {
            State::Init => {
                let (Init { id, uuid }, used) = decode_init(input, self.uuid.as_ref(), self.channels)?;
                self.id = Some(id);
                self.uuid = Some(uuid);
                self.state = State::Header;
                Ok((used, Some(Told::Opened(id))))
            }
            State::Header => {
                let (Packet { sync, number, pages }, used) = decode_packet(input, self.page, self.method)?;
                self.numbers.took(number, sync, pages.is_some());
                let told = match pages {
                    Some(pages) => {
                        self.plan(&pages, blocks)?;
                        self.state = State::Payload { then_sync: sync };
                        Some(Told::Packet)
                    }
                    None if sync => {
                        self.state = State::Barrier;
                        Some(Told::Barrier)
                    }
                    None => None,
                };
                Ok((used, told))
            }
            State::Payload { .. } => Ok((0, Some(Told::Packet))),
            State::Barrier => Ok((0, Some(Told::Barrier))),
        }
    }

    fn plan(&mut self, pages: &Pages<'_>, blocks: &AnnouncedBlocks) -> Result<(), DecodeError> {
        if self.barriers == 0 {
            let fault = Fault::Multifd("pages come before the first barrier, so their blocks are not known");
            return Err(DecodeError::corrupt(16, fault));
        }
        let unknown = || DecodeError::corrupt(64, Fault::UnknownBlock { name: pages.block.into() });
        let block = blocks.find(pages.block).ok_or_else(unknown)?;
        let announced = blocks.as_slice().get(block.as_usize()).ok_or_else(unknown)?;
        let last = announced.used_length.checked_sub(self.page.bytes());
        let inside = |(i, offset): (usize, BlockOffset)| {
            if last.is_some_and(|last| offset.0 <= last) && self.page.divides(offset.0) {
                return Ok(offset);
            }
            let block = pages.block.into();
            let fault = Fault::OutsideBlock { block, offset, used_length: announced.used_length };
            Err(DecodeError::corrupt(320 + 8 * i, fault))
        };
        let normal = pages.normal().enumerate().map(inside).collect::<Result<Vec<_>, _>>()?;
        let zero_at = normal.len();
        let zero = pages.zero().enumerate().map(|(i, offset)| inside((zero_at + i, offset)));
        let zero = zero.collect::<Result<Vec<_>, _>>()?;
        self.plan = Plan { block: Some(block), normal, zero, payload: pages.payload };
        Ok(())
    }

    /// Pages and payload of the last packet.
    pub fn packet(&self) -> &Plan {
        &self.plan
    }

    /// The payload of the last packet has been read. Does nothing in any other state.
    pub fn payload_taken(&mut self) {
        if let State::Payload { then_sync } = self.state {
            self.position += u64::from(self.plan.payload);
            self.state = if then_sync { State::Barrier } else { State::Header };
        }
    }

    /// All channels and the main channel reached the barrier. Does nothing in any other state.
    pub fn release(&mut self) {
        if self.state == State::Barrier {
            self.barriers += 1;
            self.state = State::Header;
        }
    }

    /// Number of the channel, once it has arrived.
    pub fn id(&self) -> Option<u8> {
        self.id
    }

    /// UUID of the VM, once it has arrived; zero before, and if the VM has none.
    pub fn uuid(&self) -> [u8; 16] {
        self.uuid.unwrap_or_default()
    }

    /// Number of barriers that the channel has passed.
    pub fn barriers(&self) -> u64 {
        self.barriers
    }

    /// Numbers of the packets that have arrived since the last call.
    pub fn take_numbers(&mut self) -> PacketNumbers {
        std::mem::take(&mut self.numbers)
    }

    /// True where the channel may be closed: between packets.
    pub fn may_end_here(&self) -> bool {
        self.state == State::Header
    }
}

enum Told {
    Opened(u8),
    Packet,
    Barrier,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::blocks::BlockAnnouncement;
    use super::super::multifd::{NewPacket, encode_init, encode_packet, encode_sync};
    use super::*;
    use crate::ram::BlockName;

    const PAGE: PageSize = PageSize::SIZE_4K;

    fn blocks() -> AnnouncedBlocks {
        let name = BlockName::new("pc.ram").unwrap();
        let block = BlockAnnouncement { name, used_length: 0x4000, host_page: None, guest_addr: None };
        AnnouncedBlocks::new(vec![block]).unwrap()
    }

    fn opened() -> Channel {
        let mut channel = Channel::new(PAGE, Method::Plain, Some([0; 16]), 2);
        let mut init = Vec::new();
        encode_init(&Init { uuid: [0; 16], id: 1 }, &mut init);
        assert_eq!(channel.next(&init, &blocks()), Ok(ChannelStep::Opened { consumed: 64, id: 1 }));
        channel
    }

    fn pages(block: &str, offsets: &[u64]) -> Vec<u8> {
        let normal: Vec<BlockOffset> = offsets.iter().map(|offset| BlockOffset(*offset)).collect();
        let payload = 4096 * normal.len() as u32;
        let mut out = Vec::new();
        encode_packet(
            &NewPacket { number: 0, method: Method::Plain, block, normal: &normal, zero: &[], payload },
            PAGE,
            &mut out,
        );
        out
    }

    fn sync() -> Vec<u8> {
        let mut out = Vec::new();
        encode_sync(0, PAGE, &mut out);
        out
    }

    #[test]
    fn s42_s44_a_channel_stops_at_sync_until_it_is_released() {
        let mut channel = opened();
        assert_eq!(channel.next(&sync(), &blocks()), Ok(ChannelStep::Barrier { consumed: 1344 }));
        assert_eq!(channel.next(&pages("pc.ram", &[0]), &blocks()), Ok(ChannelStep::Barrier { consumed: 0 }));
        channel.release();
        // SYNC on a packet with pages: the pages come first. Then an empty packet with stale values.
        let mut both = pages("pc.ram", &[0x3000, 0]);
        both[11] |= 1;
        assert_eq!(channel.next(&both, &blocks()), Ok(ChannelStep::Packet { consumed: 1344 }));
        let plan = channel.packet().clone();
        assert_eq!(
            (plan.block, plan.normal, plan.payload),
            (Some(BlockIndex(0)), vec![BlockOffset(0x3000), BlockOffset(0)], 8192)
        );
        channel.payload_taken();
        assert_eq!(channel.next(&[], &blocks()), Ok(ChannelStep::Barrier { consumed: 0 }));
        channel.release();
        let mut empty = pages("gone", &[]);
        empty[20..24].fill(9);
        assert_eq!(
            channel.next(&empty, &blocks()),
            Ok(ChannelStep::NeedMore { consumed: 1344, needed: 8 - 4 })
        );
        assert!(channel.may_end_here() && channel.barriers() == 2);
    }

    #[test]
    fn s40_s43_pages_must_lie_in_a_known_block_behind_the_first_barrier() {
        let error = opened().next(&pages("pc.ram", &[0]), &blocks()).unwrap_err();
        assert!(
            matches!(error, DecodeError::Corrupt(c) if c.at == 64 + 16 && matches!(c.fault, Fault::Multifd(_)))
        );
        #[rustfmt::skip]
        let cases: &[(&str, &str, &[u64], u64)] = &[
            ("unknown block",     "vga",    &[0],              64),
            ("behind the block",  "pc.ram", &[0, 0x4000],      328),
            ("near 2^64",         "pc.ram", &[u64::MAX - 4095], 320),
            ("inside a page",     "pc.ram", &[0x10],           320),
        ];
        for (what, block, offsets, at) in cases {
            let mut channel = opened();
            channel.next(&sync(), &blocks()).unwrap();
            channel.release();
            let error = channel.next(&pages(block, offsets), &blocks()).unwrap_err();
            assert!(
                matches!(error, DecodeError::Corrupt(ref c) if c.at == 64 + 1344 + at),
                "{what}: {error:?}"
            );
        }
    }
}
