//! The modelled destination: a QEMU, or a ramwire, as the source sees it.

mod channel;
mod loss;
mod pages;
mod parts;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::channels::{CHANNELS, PageInChannel};
use super::{Fault, PAGE, Plan};
use crate::engine::{UrgentChannel, is_mark};
use crate::session::Control;
use crate::session::sim::plan::Rng;
use crate::stream::native::{Answer, GREETING, MAX_VERSION, Order, decode_state_section, hello_pong};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use crate::stream::qemu::package::{PING_TAKEN, decode_package};
use crate::stream::qemu::return_path::{Message, encode_bitmap};
use crate::sys::CancelToken;
pub(super) use channel::{Again, Sink};
use parts::{Part, Start, Urgent};

pub(super) type Shared = Arc<Mutex<Destination>>;

/// The PING behind the package.
const PING_PACKAGED: u32 = 4;
/// Maximum number of background pages in a batch; it ends with a host page.
const BATCH: u64 = 64;

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
    /// How often the source continued over another connection, and how often such a connection was lost before that.
    pub(super) recoveries: u64,
    pub(super) lost_recovering: u64,
    /// Of the former, those before the guest was started, and those after the report that all has arrived.
    pub(super) early_recoveries: u64,
    pub(super) late_recoveries: u64,
    /// The guest was not lost with a connection: another one finds it.
    pub(super) may_be_reached: bool,
    pub(super) violations: Vec<String>,
    fault: Fault,
    /// Loading the device state fails after a recovery.
    loads_badly: bool,
    /// The connection is lost with the report that all has arrived.
    loses_last_word: bool,
    fault_every: u64,
    rng: Rng,
    cancel: CancelToken,
    stream: IncomingStream,
    input: Vec<u8>,
    sent: u64,
    /// Bytes sent on this connection, and where it breaks.
    sent_here: u64,
    breaks_at: Option<u64>,
    pub(super) cut: bool,
    /// Bytes that the source counts as sent, and that were lost with a connection.
    pub(super) swallowed: u64,
    /// Another connection is open, and the source has not sent RESUME on it.
    recovering: bool,
    /// Unanswered marks between pages, with the number of pages before each.
    marks: VecDeque<(u32, u64)>,
    /// Background pages received after the package, and how many of them the source knows to be received; `None` until
    /// it knows of any.
    filled: u64,
    known: Option<u64>,
    /// Host pages that were requested and not received, by block and first page.
    outstanding: Vec<(usize, u64)>,
    replies: VecDeque<u8>,
    /// Target pages per host page, and the number of each placed page.
    hosts: Vec<u64>,
    pages: Vec<Vec<Option<u64>>>,
    /// The connection for urgent pages, if it requires one.
    pub(super) urgent: Urgent,
    /// Makes the source continue over another connection, if it waits for that.
    pub(super) operator: Option<Control>,
    /// The loss was noticed here, and the source was told to continue.
    told: bool,
    /// Partly received host pages, on the main connection, on the urgent one, and on page channels.
    parts: [Part; 2 + CHANNELS],
    /// Page channels: batches that were sent and not taken.
    pub(super) channels: [VecDeque<Vec<PageInChannel>>; CHANNELS],
    /// Missing pages that came on them.
    pub(super) channel_pages: u64,
    /// The PING behind the package was read, and whether it was answered: from then on they may carry missing pages.
    serves: Option<bool>,
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
            early_recoveries: 0,
            late_recoveries: 0,
            loads_badly: plan.loads_badly,
            loses_last_word: plan.loses_last_word && matches!(plan.fault, Fault::Cuts { .. }),
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
            urgent: Urgent { wanted: plan.urgent, ..Urgent::default() },
            operator: None,
            told: false,
            parts: Default::default(),
            channels: Default::default(),
            channel_pages: 0,
            serves: None,
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

    /// True if a page of the paused guest is neither in `whole`, the source's memory, nor here.
    pub(super) fn is_nowhere(&self, whole: &[Vec<u64>]) -> bool {
        let sides = self.paused_with.iter().zip(whole).zip(&self.pages);
        let mut pages = sides.flat_map(|((was, source), here)| was.iter().zip(source).zip(here));
        pages.any(|((was, source), here)| was != source && *here != Some(*was))
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
                self.place(0, block.as_usize(), offset.0 / PAGE as u64, number);
            }
            Event::Zero { block, offset } => self.place(0, block.as_usize(), offset.0 / PAGE as u64, 0),
            Event::MultifdFlush => (0..CHANNELS).for_each(|channel| while self.deliver(channel) {}),
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
            Command::Ping(PING_PACKAGED) => self.serves = Some(false),
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
                self.early_recoveries += u64::from(self.start != Start::Done);
                self.late_recoveries += u64::from(self.shut);
                self.shut = false;
                self.say(Message::ResumeAck(1));
                for (block, first) in self.outstanding.clone() {
                    self.request(block, first * PAGE as u64, (self.hosts[block] * PAGE as u64) as u32);
                }
                // The first answer may be lost.
                if self.native && self.start == Start::Done {
                    self.say(Message::Pong(PING_TAKEN));
                }
            }
            Command::RecvBitmap { .. } | Command::PostcopyResume => {
                self.violations.push(format!("{command:?} comes on a connection that was not lost"));
            }
            Command::Native(Order::Hello(theirs)) => self.say(Message::Native(Answer::Hello(theirs))),
            // A ramwire's precopy: everything is loaded at once.
            Command::Native(Order::StateSent) => self.say(Message::Native(Answer::Ready)),
            Command::Native(Order::Commit { .. }) => {
                (self.committed, self.ended) = (true, true);
                self.run();
                self.say(Message::Native(Answer::Running));
            }
            _ => {}
        }
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
        self.start = Start::Loading(self.rng.below_one_of(&[20, 200]));
        if matches!(self.fault, Fault::Cuts { .. }) && self.rng.one_in(3) {
            self.breaks_at = Some(self.sent_here + self.rng.below(4000));
        }
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

    /// One step of its own: a device or a thread waits for a page, or the start progresses.
    fn act(&mut self) {
        let resumed = self.recoveries > 0 && !self.recovering;
        let waits = resumed && self.urgent.wanted.is_some() && !self.urgent.connected;
        if self.cut || self.urgent.is_waited_for() || waits {
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
        if self.serves == Some(false) && self.rng.one_in(3) {
            self.serves = Some(true);
            self.say(Message::Pong(PING_PACKAGED));
        }
        if self.rng.one_in(2) {
            let channel = self.rng.below(CHANNELS as u64) as usize;
            self.deliver(channel);
        }
        match self.start {
            Start::Loading(0) if self.fault == Fault::Load || (self.loads_badly && self.recoveries > 0) => {
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
            Start::Done if self.ended && !self.shut && self.urgent_is_over() => {
                self.shut = true;
                if std::mem::take(&mut self.loses_last_word) {
                    return self.lose();
                }
                match self.native {
                    true => self.say(Message::Native(Answer::Running)),
                    false => self.say(Message::Shut { status: 0 }),
                }
            }
            Start::NotYet | Start::Done | Start::Failed => {}
        }
    }

    /// A QEMU 7.2 waits for the last mark.
    fn urgent_is_over(&self) -> bool {
        self.urgent.wanted != Some(UrgentChannel::Early) || self.urgent.ended || !self.packaged
    }

    fn ask(&mut self) {
        // After the end there is nothing to wait for.
        if self.shut || self.recovering || self.ended {
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

    /// The source is gone: a guest that was handed over may still start.
    pub(super) fn end(&mut self) {
        // A ramwire starts it only if it knows that its answer has arrived.
        if matches!(self.start, Start::Loading(_)) && self.fault != Fault::Load && !self.native {
            self.run();
        }
    }
}
