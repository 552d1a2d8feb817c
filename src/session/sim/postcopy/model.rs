//! The modelled destination: a QEMU, or a ramwire, as the source sees it.

mod channel;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::{Fault, PAGE, Plan};
use crate::engine::{FIRST_ROOM, is_mark};
use crate::session::sim::plan::Rng;
use crate::stream::native::{Answer, GREETING, MAX_VERSION, Order, decode_state_section, hello_pong};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use crate::stream::qemu::package::decode_package;
use crate::stream::qemu::return_path::{Message, encode_bitmap};
use crate::sys::CancelToken;
pub(super) use channel::{Again, Sink};

pub(super) type Shared = Arc<Mutex<Destination>>;

/// Pages of a batch that nobody waits for, at the most, and of the host page that it completes.
const BATCH: u64 = 64 + 16;

/// How far the guest's start has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Start {
    NotYet,
    /// The device state is being loaded, for so many steps; devices ask for pages as well.
    Loading(u64),
    Done,
    Failed,
}

pub(super) struct Destination {
    pub(super) native: bool,
    pub(super) runs_here: bool,
    /// Numbers of the source's pages when it was paused.
    pub(super) paused_with: Vec<Vec<u64>>,
    pub(super) runs: bool,
    pub(super) packaged: bool,
    pub(super) committed: bool,
    pub(super) ended: bool,
    pub(super) requests: u64,
    pub(super) asked_nonsense: bool,
    /// Times that the source went on over another connection, and that such a one was lost before.
    pub(super) recoveries: u64,
    pub(super) lost_recovering: u64,
    /// The guest was not lost with a connection: another one finds it.
    pub(super) may_be_reached: bool,
    pub(super) violations: Vec<String>,
    fault: Fault,
    fault_every: u64,
    rng: Rng,
    cancel: CancelToken,
    stream: IncomingStream,
    input: Vec<u8>,
    sent: u64,
    /// Of this connection, and where it breaks.
    sent_here: u64,
    breaks_at: Option<u64>,
    cut: bool,
    /// Bytes that the source takes for sent, and that were lost with a connection.
    pub(super) swallowed: u64,
    /// Another connection is there, and the source has not said RESUME on it.
    recovering: bool,
    /// Marks between pages that are not answered yet, with the pages in front of each.
    marks: VecDeque<(u32, u64)>,
    /// Pages that came behind the package and nobody waited for, and of them those that the source knows of; `None` until it
    /// knows of any.
    filled: u64,
    known: Option<u64>,
    /// Host pages that were asked for and have not come, by block and first page.
    outstanding: Vec<(usize, u64)>,
    replies: VecDeque<u8>,
    /// Target pages of host pages, and the number of each page that is in place.
    hosts: Vec<u64>,
    pages: Vec<Vec<Option<u64>>>,
    /// The host page that has come in part: block, first page, pages.
    part: Option<(usize, u64, u64)>,
    /// Numbers of its pages.
    arriving: Vec<u64>,
    discards: u64,
    package: Vec<u8>,
    start: Start,
    pings: Vec<u32>,
    /// The last block that a request named.
    asked: Option<usize>,
    shut: bool,
}

impl Destination {
    pub(super) fn new(plan: &Plan, rng: Rng, cancel: CancelToken) -> Self {
        Self {
            native: plan.native,
            runs_here: true,
            paused_with: Vec::new(),
            runs: false,
            packaged: false,
            committed: false,
            ended: false,
            requests: 0,
            asked_nonsense: false,
            recoveries: 0,
            lost_recovering: 0,
            may_be_reached: true,
            violations: Vec::new(),
            fault: plan.fault,
            fault_every: plan.fault_every,
            rng,
            cancel,
            stream: IncomingStream::new(IncomingConfig::default()),
            input: Vec::new(),
            sent: 0,
            sent_here: 0,
            breaks_at: match plan.fault {
                Fault::Cut(at) | Fault::Cuts { at, .. } => Some(at),
                _ => None,
            },
            cut: false,
            swallowed: 0,
            recovering: false,
            marks: VecDeque::new(),
            filled: 0,
            known: None,
            outstanding: Vec::new(),
            replies: VecDeque::new(),
            hosts: plan.blocks.iter().map(|(_, host)| *host).collect(),
            pages: plan.blocks.iter().map(|(pages, _)| vec![None; *pages as usize]).collect(),
            part: None,
            arriving: Vec::new(),
            discards: 0,
            package: Vec::new(),
            start: Start::NotYet,
            pings: Vec::new(),
            asked: None,
            shut: false,
        }
    }

    pub(super) fn look_at_both_sides(&mut self) {
        if self.runs && self.runs_here {
            self.violations.push("the guest runs on both sides".into());
        }
    }

    fn say(&mut self, message: Message<'_>) {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.replies.extend(bytes);
    }

    fn receive(&mut self, bytes: &[u8]) {
        self.sent += bytes.len() as u64;
        self.sent_here += bytes.len() as u64;
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut at = 0;
        let mut stream = std::mem::replace(&mut self.stream, IncomingStream::new(IncomingConfig::default()));
        loop {
            match stream.next(&input[at..]) {
                Ok(Step::Event { consumed, event }) => {
                    at += consumed;
                    let last = event == Event::Done;
                    self.event(event);
                    if last {
                        break;
                    }
                }
                Ok(Step::NeedMore { consumed, .. }) => {
                    at += consumed;
                    break;
                }
                Err(error) => {
                    self.violations.push(format!("the stream is not understood: {error}"));
                    at = input.len();
                    break;
                }
            }
        }
        self.stream = stream;
        self.input = input[at..].to_vec();
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Command(command) => self.command(command),
            Event::Page { block, offset, bytes } => {
                let number = bytes[..8].try_into().map_or(0, u64::from_ne_bytes);
                self.place(block.as_usize(), offset.0 / PAGE as u64, number);
            }
            Event::Zero { block, offset } => self.place(block.as_usize(), offset.0 / PAGE as u64, 0),
            Event::PackageBytes(bytes) => self.package.extend_from_slice(bytes),
            Event::PackageEnd => self.package_is_whole(),
            Event::Done => self.stream_ends(),
            _ => {}
        }
    }

    fn command(&mut self, command: Command<'_>) {
        match command {
            Command::Ping(GREETING) if self.native => {
                self.say(Message::Pong(GREETING));
                self.say(Message::Pong(hello_pong(MAX_VERSION)));
            }
            Command::Ping(value) if is_mark(value) => self.marks.push_back((value, self.filled)),
            Command::Ping(value) => self.say(Message::Pong(value)),
            Command::PostcopyRamDiscard(discard) => {
                let block =
                    (0..self.hosts.len()).find(|index| discard.block() == format!("b{index}")).unwrap();
                let host = self.hosts[block] * PAGE as u64;
                for (start, length) in discard.ranges() {
                    assert!(start % host == 0 && length % host == 0 && length > 0, "not whole host pages");
                    let pages = (start / PAGE as u64) as usize..((start + length) / PAGE as u64) as usize;
                    self.pages[block][pages].fill(None);
                    self.discards += 1;
                }
            }
            Command::RecvBitmap { block } if self.recovering => {
                let index = (0..self.hosts.len()).find(|index| block == format!("b{index}")).unwrap();
                let pages = &self.pages[index];
                let mut bits = vec![0; pages.len().div_ceil(8)];
                for at in (0..pages.len()).filter(|at| pages[*at].is_some()) {
                    bits[at / 8] |= 1 << (at % 8);
                }
                self.say(Message::ReceivedBitmap { block });
                let mut bytes = Vec::new();
                encode_bitmap(&bits, &mut bytes);
                self.replies.extend(bytes);
            }
            Command::PostcopyResume if self.recovering => {
                self.recovering = false;
                self.recoveries += 1;
                self.say(Message::ResumeAck(1));
                for (block, first) in self.outstanding.clone() {
                    self.request(block, first * PAGE as u64, (self.hosts[block] * PAGE as u64) as u32);
                }
            }
            Command::RecvBitmap { .. } | Command::PostcopyResume => {
                self.violations.push(format!("{command:?} comes on a connection that was not lost"));
            }
            Command::Native(Order::Hello(theirs)) => self.say(Message::Native(Answer::Hello(theirs))),
            // A ramwire's precopy: all is loaded at once.
            Command::Native(Order::StateSent) => self.say(Message::Native(Answer::Ready)),
            Command::Native(Order::Commit { .. }) => {
                (self.committed, self.ended) = (true, true);
                self.run();
                self.say(Message::Native(Answer::Running));
            }
            _ => {}
        }
    }

    fn place(&mut self, block: usize, page: u64, number: u64) {
        if !self.packaged {
            self.pages[block][page as usize] = Some(number);
            return;
        }
        let host = self.hosts[block];
        let first = page / host * host;
        let (at, from, come) = self.part.unwrap_or((block, first, 0));
        if (at, from) != (block, first) {
            self.violations.push("host pages interleave".into());
        }
        self.part = (come + 1 < host).then_some((block, first, come + 1));
        if self.recovering {
            self.violations.push("a page comes in front of RESUME".into());
        }
        // A page that has come may have been written by the guest since. What a lost connection broke off comes again whole.
        let was_here = self.pages[block][page as usize].is_some();
        if was_here {
            self.violations.push("a page comes that is there and was not forgotten".into());
        }
        self.arriving.push(number);
        if come + 1 == host {
            for (at, number) in (first..).zip(std::mem::take(&mut self.arriving)) {
                self.pages[block][at as usize] = Some(number);
            }
            if !self.outstanding.contains(&(block, first)) {
                self.filled += host;
            }
            if self.known.is_none() && self.filled > FIRST_ROOM + BATCH {
                self.violations.push("too many pages are ahead of what was answered".into());
            }
            self.outstanding.retain(|page| *page != (block, first));
        }
    }

    /// The connection is lost: what has come of a host page is dropped, and what had not started may be lost with it.
    fn lose(&mut self) {
        self.cut = true;
        self.part = None;
        self.arriving.clear();
        self.replies.clear();
        self.input.clear();
        self.marks.clear();
        (self.filled, self.known) = (0, None);
        self.lost_recovering += u64::from(self.recovering);
        match self.start {
            // A QEMU before 10.2 has given itself up by RUN, and starts the guest; a later one discards it.
            Start::Loading(_) if self.rng.one_in(2) && self.fault != Fault::Load => {
                self.start = Start::Done;
                self.run();
            }
            Start::Loading(_) => (self.start, self.may_be_reached) = (Start::Failed, false),
            Start::NotYet => self.may_be_reached = false,
            // Its last word is lost as well.
            Start::Done if self.shut => self.may_be_reached = false,
            Start::Done | Start::Failed => {}
        }
    }

    /// The source connects again.
    fn reconnect(&mut self) -> bool {
        if !matches!(self.fault, Fault::Cuts { .. }) || self.start != Start::Done || self.shut {
            return false;
        }
        if let Fault::Cuts { next, times, .. } = &mut self.fault {
            *times -= 1;
            self.breaks_at = (*times > 0).then_some(*next);
        }
        self.stream.restart();
        (self.cut, self.recovering, self.ended, self.asked, self.sent_here) = (false, true, false, None, 0);
        true
    }

    fn package_is_whole(&mut self) {
        (self.packaged, self.committed) = (true, true);
        let package = std::mem::take(&mut self.package);
        let decoded = decode_package(&package).unwrap();
        let state = if self.native { decode_state_section(decoded.sections).unwrap() } else { b"devices" };
        assert_eq!(state, b"devices");
        self.pings = decoded.pings;
        if self.discards == 0 {
            self.violations.push("RUN comes and nothing was forgotten: a QEMU refuses it".into());
        }
        for (there, here) in self.pages.iter().flatten().zip(self.paused_with.iter().flatten()) {
            if there.is_some_and(|number| number != *here) {
                self.violations.push("an older page is not forgotten when the guest starts".into());
                break;
            }
        }
        self.start = Start::Loading(self.rng.below(20));
    }

    fn run(&mut self) {
        self.runs = true;
        self.look_at_both_sides();
    }

    fn stream_ends(&mut self) {
        (self.ended, self.committed) = (true, true);
        if !self.packaged && !self.native {
            self.run();
            self.say(Message::Shut { status: 0 });
        }
        if self.packaged && self.pages.iter().flatten().any(Option::is_none) {
            self.violations.push("the stream ends while pages are missing".into());
        }
    }

    /// One step of its own: a device or a thread waits for a page, the start goes on.
    fn act(&mut self) {
        if self.cut {
            return;
        }
        if matches!(self.start, Start::Loading(_) | Start::Done) && self.rng.one_in(self.fault_every) {
            self.ask();
        }
        if self.rng.one_in(2)
            && let Some((value, filled)) = self.marks.pop_front()
        {
            self.known = Some(filled);
            self.say(Message::Pong(value));
        }
        match self.start {
            Start::Loading(0) if self.fault == Fault::Load => {
                self.start = Start::Failed;
                match self.native {
                    true => self.say(Message::Native(Answer::Refused { why: "the state is broken" })),
                    false => self.say(Message::Shut { status: 1 }),
                }
            }
            Start::Loading(0) => {
                for value in std::mem::take(&mut self.pings) {
                    self.say(Message::Pong(value));
                }
                self.start = Start::Done;
                self.run();
            }
            Start::Loading(left) => self.start = Start::Loading(left - 1),
            Start::Done if self.ended && !self.shut => {
                self.shut = true;
                match self.native {
                    true => self.say(Message::Native(Answer::Running)),
                    false => self.say(Message::Shut { status: 0 }),
                }
            }
            Start::NotYet | Start::Done | Start::Failed => {}
        }
    }

    fn ask(&mut self) {
        if self.shut || self.recovering {
            return;
        }
        let block = self.rng.below(self.hosts.len() as u64) as usize;
        let host = self.hosts[block];
        let first = self.rng.below(self.pages[block].len() as u64 / host) * host;
        let (mut start, mut length) = (first * PAGE as u64, (host * PAGE as u64) as u32);
        if self.fault == Fault::Hostile && self.start == Start::Done && self.rng.one_in(4) {
            let end = self.pages[block].len() as u64 * PAGE as u64;
            (start, length) =
                self.rng.pick(&[(start, 0), (start + 1, length), (end, length), (u64::MAX - 4095, length)]);
            self.asked_nonsense = true;
        }
        if self.pages[block][first as usize].is_none() {
            self.outstanding.push((block, first));
        }
        self.request(block, start, length);
    }

    fn request(&mut self, block: usize, start: u64, length: u32) {
        self.requests += 1;
        if self.asked.replace(block) == Some(block) {
            return self.say(Message::RequestPages { start, length });
        }
        let name = format!("b{block}");
        self.say(Message::RequestPagesOf { block: &name, start, length });
    }

    /// The source is gone: what was given away may start yet.
    pub(super) fn end(&mut self) {
        if matches!(self.start, Start::Loading(_)) && self.fault != Fault::Load {
            self.run();
        }
    }
}
