//! Missing pages that the destination reads from its source's memory.
//!
//! Two queue pairs, so that a page that a thread waits for does not wait for all others. Bytes are stored in registered
//! buffers of our own, and the kernel places them from there: memory of a guest that runs is not registered.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Mutex;

use rdma_hooks::{DestinationHooks, HooksError, ReadDone, ReadLane};

use super::End;
use crate::error::Chain;
use crate::sys::{CancelToken, HostRegion, Lock as _, Mapping, PageContents, Stop};
use crate::transport::{ChannelError, MoveError, PageReader, PageReads, PageSpan, PulledPages, RemoteSpan};
use crate::units::BlockIndex;

const READING: &str = "reading missing pages";

/// Bytes of one READ that no thread waits for.
const REST_BYTES: u64 = 1 << 20;
/// Buffers for such READs: what one of them has brought is placed while the others are under way.
const REST_READS: u64 = 7;
/// READs under way that threads wait for: so many small ones, or so many bytes, but at least two.
const URGENT_READS: u64 = 16;
const URGENT_BYTES: u64 = 1 << 20;
/// Largest host page that a READ fills.
const MAX_HOST_PAGE: u64 = 2 << 20;

/// The source's memory, as far as there are keys.
pub(super) struct RdmaPages {
    /// For pages that threads wait for, and for all others.
    lanes: [Mutex<Lane>; 2],
    /// By block and first byte.
    keys: Mutex<BTreeMap<(BlockIndex, u64), RemoteSpan>>,
    failure: Mutex<Failure>,
    end: End,
    over: CancelToken,
}

struct Lane {
    lane: ReadLane,
    /// Its buffers.
    room: HostRegion,
    /// What is under way, by buffer.
    flights: HashMap<usize, PageSpan>,
}

/// Why nothing can be read any more.
#[derive(Default)]
struct Failure {
    has_failed: bool,
    why: Option<ChannelError>,
}

impl RdmaPages {
    pub(super) fn new(hooks: &mut DestinationHooks, end: End, host_page: u64) -> Result<Self, MoveError> {
        if host_page > MAX_HOST_PAGE {
            return Err(
                failed(&end, HooksError::OutOfOrder("host pages of more than 2 MiB are not read")).into()
            );
        }
        let urgent = (URGENT_BYTES / host_page).clamp(2, URGENT_READS);
        let rest = REST_BYTES.max(host_page);
        let room = |bytes: u64, reads: u64| {
            let memory =
                Mapping::anonymous(bytes * reads).map_err(|error| io::Error::other(error.to_string()));
            let memory = memory.map_err(|source| ChannelError::Io {
                peer: end.peer.clone(),
                doing: READING,
                source,
            })?;
            Ok::<_, ChannelError>((memory.region().clone(), bytes))
        };
        let rooms = [room(host_page, urgent)?, room(rest, REST_READS)?];
        let registered = |(room, bytes): &(HostRegion, u64)| {
            let region = room.for_nic(room.len());
            let region = region.ok_or_else(|| failed(&end, HooksError::OutOfOrder("buffers without memory")));
            region.map(|region| (region, *bytes))
        };
        let [first, rest] = &rooms;
        let lanes = hooks.read_lanes([registered(first)?, registered(rest)?]);
        let [first, rest] = lanes.map_err(|error| failed(&end, error))?;
        let lane = |lane, (room, _)| Mutex::new(Lane { lane, room, flights: HashMap::new() });
        let [first_room, rest_room] = rooms;
        let lanes = [lane(first, first_room), lane(rest, rest_room)];
        let over = CancelToken::default();
        Ok(Self { lanes, keys: Mutex::default(), failure: Mutex::default(), end, over })
    }

    /// Key and address of these bytes.
    fn key_of(&self, span: PageSpan) -> Option<(u32, u64)> {
        let keys = self.keys.locked();
        let (_, found) = keys.range(..=(span.block, span.offset)).next_back()?;
        let skip = span.offset - found.span.offset.min(span.offset);
        let is_inside = found.span.block == span.block && skip + span.len <= found.span.len;
        is_inside.then(|| (found.rkey, found.address.wrapping_add(skip)))
    }

    fn lose(&self, error: HooksError) -> io::Error {
        let error = failed(&self.end, error);
        let shown = io::Error::other(Chain(&error).to_string());
        let mut failure = self.failure.locked();
        if !std::mem::replace(&mut failure.has_failed, true) {
            failure.why = Some(error);
        }
        shown
    }

    /// Posts what `reads` gives, as long as there are buffers.
    fn post(&self, Lane { lane, flights, .. }: &mut Lane, reads: &mut dyn PageReads) {
        while lane.has_room() && !self.over.is_cancelled() {
            let Some(span) = reads.next() else { return };
            let Some((rkey, address)) = self.key_of(span) else {
                reads.ended(span, Err(io::Error::other("there is no key for it")));
                continue;
            };
            match lane.post(rkey, address, u32::try_from(span.len).unwrap_or(u32::MAX)) {
                Ok(slot) => _ = flights.insert(slot, span),
                Err(error) => reads.ended(span, Err(self.lose(error))),
            }
        }
    }
}

/// `error` of these READs.
fn failed(end: &End, error: HooksError) -> ChannelError {
    let stop = Stop::never();
    let bounds = end.stall_bounds(&stop);
    bounds.error(READING, error)
}

impl PageReader for RdmaPages {
    fn read_all(&self, urgent: bool, reads: &mut dyn PageReads) {
        let [first, rest] = &self.lanes;
        let mut lane = if urgent { first } else { rest }.locked();
        let _part = lane.lane.take_part();
        let (stop, mut done, room) = (Stop::on(&self.over), Vec::new(), lane.room.clone());
        let bounds = self.end.stall_bounds(&stop);
        loop {
            self.post(&mut lane, reads);
            lane.lane.poll(&mut done);
            let why = lane.lane.take_failure_once();
            let why = why.map(|error| self.lose(error));
            if done.is_empty() {
                if lane.lane.under_way() == 0 || lane.lane.wait(&bounds.hooks).is_err() {
                    return;
                }
                continue;
            }
            for ReadDone { slot, is_read } in done.drain(..) {
                let Some(span) = lane.flights.remove(&slot) else { continue };
                if is_read {
                    // Others are under way while this one is placed; a thread waits for no other one first.
                    if !urgent {
                        self.post(&mut lane, reads);
                    }
                    let contents = room.span(slot as u64 * lane.lane.slot_bytes(), span.len);
                    let contents = contents.map(PageContents::Memory).map_err(io::Error::other);
                    reads.ended(span, contents);
                } else {
                    let text =
                        why.as_ref().map_or_else(|| "its connection is lost".into(), ToString::to_string);
                    reads.ended(span, Err(io::Error::other(text)));
                }
                lane.lane.release(slot);
            }
        }
    }

    fn name(&self) -> String {
        self.end.peer.clone()
    }

    fn is_gone(&self) -> bool {
        self.over.is_cancelled() || self.failure.locked().has_failed
    }
}

impl PulledPages for RdmaPages {
    fn grant(&self, memory: RemoteSpan) {
        self.keys.locked().insert((memory.span.block, memory.span.offset), memory);
    }

    fn end(&self) {
        self.over.cancel();
    }

    fn take_failure(&self) -> Option<ChannelError> {
        self.failure.locked().why.take()
    }
}
