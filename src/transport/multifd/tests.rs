//! The order that channels must keep, and the result without it.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::*;
use crate::guest::{GuestMemory, MappedGuest, PageObserver, Placer};
use crate::ram::{BlockName, PageBatch, PageRun, RamBlock, RoundKind, Verdict};
use crate::stream::qemu::blocks::BlockAnnouncement;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::multifd::{Init, Method, NewPacket, encode_init, encode_packet, encode_sync};
use crate::stream::qemu::style::PeerStyle;
use crate::sys::{CancelToken, HostSpan, Mapping, Stop, is_zero};
use crate::transport::{DestinationLink, MoveError, Offer, SourceLink, StreamChannel, StreamOptions};
use crate::units::{BlockIndex, BlockOffset, PageIndex, PageSize};

const PAGE: PageSize = PageSize::SIZE_4K;
const PAGES: u64 = 4;

/// A guest of one small block, and the pages that were placed in it: offset and first byte at that moment.
struct Memory {
    guest: Arc<MappedGuest>,
    placed: Mutex<Vec<(u64, u8)>>,
}

impl Memory {
    fn new() -> Arc<Self> {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
        let mapping = Mapping::memfd("channels", PAGES * 4096).unwrap();
        let guest = MappedGuest::builder(PAGE).mapping(block, &mapping).build().unwrap();
        Arc::new(Self { guest: Arc::new(guest), placed: Mutex::default() })
    }

    fn first_byte(&self, offset: u64) -> u8 {
        let mut byte = [0];
        self.room(BlockIndex(0), BlockOffset(offset), 4096).copy_to(&mut byte);
        byte[0]
    }

    fn room(&self, block: BlockIndex, offset: BlockOffset, bytes: u64) -> HostSpan<'_> {
        self.guest.span(self.guest.table().admit(block, offset, bytes).unwrap()).unwrap()
    }

    fn placer(self: &Arc<Self>) -> Arc<Placer> {
        let observer = Arc::clone(self) as Arc<dyn PageObserver>;
        let guest = Arc::clone(&self.guest) as Arc<dyn GuestMemory>;
        Arc::new(Placer::new(guest, self.guest.table().blocks(), Some(observer)).unwrap())
    }
}

impl PageObserver for Memory {
    fn placed(&self, run: PageRun) {
        for page in run.first.0..run.end().0 {
            let first = self.first_byte(page * 4096);
            self.placed.lock().unwrap().push((page * 4096, first));
        }
    }
}

fn blocks() -> AnnouncedBlocks {
    let name = BlockName::new("ram").unwrap();
    let block = BlockAnnouncement { name, used_length: PAGES * 4096, host_page: None, guest_addr: None };
    AnnouncedBlocks::new(vec![block]).unwrap()
}

fn channel(socket: UnixStream) -> StreamChannel {
    StreamChannel::from_fd(socket.into(), "the source", &StreamOptions::default()).unwrap()
}

fn stop() -> Stop {
    Stop::on(&CancelToken::default()).within(Duration::from_secs(10))
}

fn page_zero(fill: u8) -> Vec<u8> {
    let mut out = Vec::new();
    let normal = [BlockOffset(0)];
    let packet = NewPacket {
        number: 0,
        method: Method::Plain,
        block: "ram",
        normal: &normal,
        zero: &[],
        payload: 4096,
    };
    encode_packet(&packet, PAGE, &mut out);
    out.resize(out.len() + 4096, fill);
    out
}

fn sync() -> Vec<u8> {
    let mut out = Vec::new();
    encode_sync(0, PAGE, &mut out);
    out
}

/// Sends page 0 as 1 on a slow channel in one round and as 2 on a fast one in the next; returns its final content.
/// `fenced`: the fast channel receives the end of the round.
fn the_slow_copy_comes_last(fenced: bool) -> u8 {
    let (main, _main_far) = UnixStream::pair().unwrap();
    let pairs = [UnixStream::pair().unwrap(), UnixStream::pair().unwrap()];
    let [(slow, mut slow_far), (fast, mut fast_far)] = pairs;
    let options = ChannelOptions { count: 2, ..ChannelOptions::default() };
    let channels = vec![channel(slow), channel(fast)];
    let mut link = MultifdDestination::new(channel(main), channels, options, None);
    let memory = Memory::new();
    link.announce(&memory.placer(), &blocks()).unwrap();
    for (id, far) in (0..).zip([&mut slow_far, &mut fast_far]) {
        let mut out = Vec::new();
        encode_init(&Init { uuid: [0; 16], id }, &mut out);
        far.write_all(&[out, sync()].concat()).unwrap();
    }
    link.barrier(&stop()).unwrap();
    link.release();
    let ended = if fenced { sync() } else { Vec::new() };
    fast_far.write_all(&[ended, page_zero(2)].concat()).unwrap();
    if !fenced {
        // Nothing delays the new copy: it arrives before the old one has even been sent.
        while memory.first_byte(0) != 2 {
            std::thread::yield_now();
        }
    }
    slow_far.write_all(&[page_zero(1), sync()].concat()).unwrap();
    if fenced {
        link.barrier(&stop()).unwrap();
        assert_eq!(*memory.placed.lock().unwrap(), [(0, 1)], "the next round waits behind the barrier");
        link.release();
    }
    while memory.placed.lock().unwrap().len() < 2 {
        std::thread::yield_now();
    }
    memory.first_byte(0)
}

#[test]
fn s43_s44_an_older_copy_never_overtakes_a_newer_one_on_another_channel() {
    assert_eq!(the_slow_copy_comes_last(true), 2);
}

/// Without the order the guest would continue with the older copy.
#[test]
fn s43_without_a_sync_on_every_channel_the_older_copy_wins() {
    assert_eq!(the_slow_copy_comes_last(false), 1);
}

fn link(count: u8) -> (MultifdLink, Arc<Memory>, Vec<UnixStream>) {
    let memory = Memory::new();
    let (main, main_far) = UnixStream::pair().unwrap();
    let mut far = vec![main_far];
    let options = ChannelOptions { count, ..ChannelOptions::default() };
    let open = || {
        let (near, there) = UnixStream::pair().unwrap();
        far.push(there);
        Ok(channel(near))
    };
    let link = connect(Box::new(channel(main)), memory.guest.clone(), &options, open).unwrap();
    (link, memory, far)
}

fn whole_block() -> PageBatch {
    let mut batch = PageBatch::default();
    batch.push(PageRun { block: BlockIndex(0), first: PageIndex(0), pages: PAGES }, Verdict::Unknown);
    batch
}

/// Pages that were not scanned come back with a verdict, and are sent accordingly.
#[test]
fn s46_pages_are_looked_at_on_the_channels_where_the_peer_reads_it() {
    let (mut link, memory, _far) = link(2);
    link.set_peer_style(Some(PeerStyle::QEMU_7_2)).unwrap();
    assert!(!link.abilities().classifies, "zero pages in packets would be lost there");
    link.set_peer_style(Some(PeerStyle::QEMU_10_0)).unwrap();
    assert!(link.abilities().classifies);
    memory.room(BlockIndex(0), BlockOffset(4096), 4096).copy_from(&[7; 4096]);
    assert!(matches!(link.offer(whole_block(), &stop()), Ok(Offer::Taken(_))));
    link.drain(&stop()).unwrap();
    let mut back = Vec::new();
    link.collect(&mut back).unwrap();
    let batch = &back[0].batch;
    assert_eq!((back.len(), batch.whole_pages(), batch.zero_pages()), (1, 1, 3));
    // A channel without a batch may send its first packet later.
    let all = 2 * 64 + 1344 + 4096;
    while link.channel_bytes() < all {
        std::thread::yield_now();
    }
    assert_eq!(link.channel_bytes(), all);
    assert!(is_zero(memory.room(BlockIndex(0), BlockOffset(0), 4096)));
}

#[test]
fn s45_a_peer_of_unknown_style_gets_no_channels() {
    let (mut link, _memory, _far) = link(1);
    assert!(matches!(link.set_peer_style(None), Err(MoveError::UnknownStyle)));
    assert!(matches!(link.open_round(RoundKind::Setup, &stop()), Err(MoveError::UnknownStyle)));
}

/// Every unsent batch is returned, whichever channel it waited for, and no thread remains.
#[test]
fn s50_batches_of_a_channel_that_fails_come_back() {
    let (mut link, _memory, far) = link(2);
    link.set_peer_style(Some(PeerStyle::QEMU_7_2)).unwrap();
    drop(far);
    let mut offered = 0;
    let error = loop {
        offered += 1;
        let mut batch = PageBatch::default();
        batch.push(PageRun { block: BlockIndex(0), first: PageIndex(0), pages: PAGES }, Verdict::Whole);
        match link.offer(batch, &stop()) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(error.to_string().contains("closed the connection"), "{error}");
    assert_eq!(link.reclaim().len(), offered);
}

/// A connection whose far end buffers almost nothing before it reads, and whose near end buffers much.
fn narrow_tcp() -> (StreamChannel, std::net::TcpStream) {
    let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    listener.set_recv_buffer_size(1).unwrap();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(1).unwrap();
    let near = std::net::TcpStream::connect(listener.local_addr().unwrap().as_socket().unwrap()).unwrap();
    socket2::SockRef::from(&near).set_send_buffer_size(1 << 20).unwrap();
    let channel = StreamChannel::from_fd(near.into(), "the destination", &StreamOptions::default()).unwrap();
    (channel, listener.accept().unwrap().0.into())
}

/// The kernel has all bytes, but the batch is not returned: the kernel would still read the pages.
#[test]
fn a_lent_batch_is_out_until_the_kernel_is_done_with_it() {
    let (main, _main_far) = UnixStream::pair().unwrap();
    let memory = Memory::new();
    let options = ChannelOptions { count: 1, sending: PageSending::ZeroCopy, ..ChannelOptions::default() };
    let (near, far) = narrow_tcp();
    let mut near = Some(near);
    let open = || Ok(near.take().unwrap());
    let mut link = connect(Box::new(channel(main)), memory.guest.clone(), &options, open).unwrap();
    link.set_peer_style(Some(PeerStyle::QEMU_7_2)).unwrap();
    memory.room(BlockIndex(0), BlockOffset(0), PAGES * 4096).copy_from(&[7; 4 * 4096]);
    let mut batch = PageBatch::default();
    batch.push(PageRun { block: BlockIndex(0), first: PageIndex(0), pages: PAGES }, Verdict::Whole);
    assert!(matches!(link.offer(batch, &stop()), Ok(Offer::Taken(_))));
    let all = 64 + 1344 + PAGES * 4096;
    while link.channel_bytes() < all {
        std::thread::yield_now();
    }
    let mut back = Vec::new();
    link.collect(&mut back).unwrap();
    assert!(back.is_empty(), "the far end has not read: the kernel holds the pages");
    assert!(matches!(link.drain(&stop().within(Duration::from_millis(50))), Err(MoveError::Channel(_))));
    let counts = link.zero_copy().unwrap();
    assert!(counts.sends > 0 && counts.released < counts.sends, "{counts:?}");

    let mut got = Vec::new();
    std::io::Read::take(&far, all).read_to_end(&mut got).unwrap();
    link.drain(&stop()).unwrap();
    link.collect(&mut back).unwrap();
    assert_eq!(back.len(), 1);
    let counts = link.zero_copy().unwrap();
    // The loopback copies, and one such receipt is enough.
    assert_eq!((counts.released, counts.copied), (counts.sends, counts.sends));
    assert!(counts.off.is_some_and(|why| why.contains("copies")));
}

/// The connection breaks while pages are lent: the batch is returned, and it does not count as sent.
#[test]
fn a_lent_batch_comes_back_unsent_when_its_channel_breaks() {
    let (main, _main_far) = UnixStream::pair().unwrap();
    let memory = Memory::new();
    let options = ChannelOptions { count: 1, sending: PageSending::ZeroCopy, ..ChannelOptions::default() };
    let (near, far) = narrow_tcp();
    let mut near = Some(near);
    let open = || Ok(near.take().unwrap());
    let mut link = connect(Box::new(channel(main)), memory.guest.clone(), &options, open).unwrap();
    link.set_peer_style(Some(PeerStyle::QEMU_7_2)).unwrap();
    let mut batch = PageBatch::default();
    batch.push(PageRun { block: BlockIndex(0), first: PageIndex(0), pages: PAGES }, Verdict::Whole);
    assert!(matches!(link.offer(batch, &stop()), Ok(Offer::Taken(_))));
    while link.zero_copy().unwrap().sends == 0 {
        std::thread::yield_now();
    }
    // With unread bytes the far end's close is a reset, which releases everything that waits.
    drop(far);
    let _ = link.drain(&stop());
    let mut back = Vec::new();
    let _ = link.collect(&mut back);
    assert_eq!(link.reclaim().len() + back.len(), 1, "one owner");
}

#[test]
fn within_a_host_each_core_has_one_channel_and_over_a_network_four() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let channel = |fd| StreamChannel::from_fd(fd, "peer", &StreamOptions::default()).unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let tcp = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (unix, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut channels = vec![channel(tcp.into()), channel(unix.into())];
    assert_eq!(super::default_active(&channels), cores);
    // It is unknown where a pipe leads.
    let (_reader, writer) = std::io::pipe().unwrap();
    channels.push(channel(writer.into()));
    assert_eq!(super::default_active(&channels), 4 * cores);
}

/// The highest id is 254.
#[test]
fn as_many_channels_as_there_are_ids_are_opened() {
    let (main, _main_far) = UnixStream::pair().unwrap();
    let options = ChannelOptions { count: 255, ..ChannelOptions::default() };
    let mut far_ends = Vec::new();
    let open = || {
        let (near, far) = UnixStream::pair().unwrap();
        far_ends.push(far);
        Ok(channel(near))
    };
    let memory = Memory::new();
    let link = connect(Box::new(channel(main)), Arc::clone(&memory.guest) as _, &options, open).unwrap();
    assert_eq!((link.page_channels(), far_ends.len()), (255, 255));
}
