//! A QEMU as the standby (COLO).

use std::sync::Arc;
use std::time::Duration;

use super::Standby;
use super::sending::{Limit, in_time, no_answer, one_way, out_of_turn, put};
use crate::guest::GuestMemory;
use crate::ram::PageBatch;
use crate::session::source::{RAM_SECTION_ID, announcements};
use crate::session::{Configuration, Error};
use crate::stream::checkpoints::StandbyMessage;
use crate::stream::qemu::blocks::encode_block_list;
use crate::stream::qemu::colo::{ColoMessage, MESSAGE_LEN, encode_size};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::file::{encode_configuration, encode_header};
use crate::stream::qemu::ram::{EOS_RECORD, IDSTR, VERSION};
use crate::stream::qemu::return_path::{Message, decode_message};
use crate::stream::qemu::section::{Framing, SectionName, encode_end, encode_eof, encode_part, encode_start};
use crate::stream::qemu::state::sections_end;
use crate::stream::qemu::tail::without_devices;
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink as _, ByteSource as _, ChannelError, InlinePages, StreamChannel};

/// Bytes of a PONG or a SHUT.
const RETURN_LEN: usize = 8;

/// What a QEMU is told of the guest that it keeps.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ColoPeer {
    /// Machine and validated capabilities, as its own QEMU would announce them.
    pub configuration: Configuration,
    /// It has its capability `return-path` on, as QEMU 11.1 demands with x-colo. QEMU 7.2 must have it off.
    pub has_return_path: bool,
}

/// The connection to a secondary.
pub(super) struct ToQemu {
    sink: StreamChannel,
    back: Option<StreamChannel>,
    memory: Arc<dyn GuestMemory>,
    pages: InlinePages,
    peer: ColoPeer,
    /// The checkpoint that is sent, or was sent last.
    number: u64,
    /// Messages of the return path are due, the last of which is SHUT.
    returns: bool,
    /// What has come of a message.
    come: Vec<u8>,
    is_released: bool,
}

impl ToQemu {
    pub(super) fn new(channel: StreamChannel, memory: Arc<dyn GuestMemory>, peer: ColoPeer) -> Self {
        let (sink, back) = channel.with_return_path();
        Self {
            sink,
            back,
            pages: InlinePages::new(Arc::clone(&memory)),
            memory,
            returns: peer.has_return_path,
            peer,
            number: 1,
            come: Vec::new(),
            is_released: false,
        }
    }

    fn send(&mut self, bytes: &[u8], limit: &Limit) -> Result<(), Error> {
        put(&mut self.sink, &[SendPart::Own(bytes)], limit)
    }

    /// The next `len` bytes are there; `false` if the wait was stopped.
    fn has(&mut self, len: usize, stop: &Stop) -> Result<bool, Error> {
        let back = self.back.as_mut().ok_or_else(one_way)?;
        while self.come.len() < len {
            let mut bytes = [0; RETURN_LEN];
            let room = (len - self.come.len()).min(RETURN_LEN);
            match back.recv(&mut [RecvPart::Own(&mut bytes[..room])], stop) {
                Ok(0) => {
                    let peer = back.peer().to_owned();
                    return Err(ChannelError::Closed { peer, doing: "waiting for the standby" }.into());
                }
                Ok(got) => self.come.extend_from_slice(&bytes[..got]),
                Err(ChannelError::Stopped { .. }) => return Ok(false),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(true)
    }

    /// The next message of COLO; `None` if the wait was stopped.
    fn message(&mut self, stop: &Stop) -> Result<Option<ColoMessage>, Error> {
        while self.returns {
            // Those that may come, PONG and SHUT, are of one length.
            if !self.has(RETURN_LEN, stop)? {
                return Ok(None);
            }
            let bytes = std::mem::take(&mut self.come);
            match decode_message(&bytes)?.0 {
                Message::Pong(_) => {}
                Message::Shut { status: 0 } => self.returns = false,
                Message::Shut { status } => {
                    let why = format!("it could not load the guest (SHUT {status})");
                    return Err(Error::PeerFailed { why });
                }
                _ => return Err(out_of_turn()),
            }
        }
        if !self.has(MESSAGE_LEN, stop)? {
            return Ok(None);
        }
        Ok(Some(ColoMessage::decode(&std::mem::take(&mut self.come))?))
    }

    fn footer(&self, out: &mut Vec<u8>) {
        Framing::default().encode_footer(RAM_SECTION_ID, out);
    }
}

impl Standby for ToQemu {
    fn greet(&mut self, memory: &dyn GuestMemory, limit: &Limit) -> Result<Option<StandbyMessage>, Error> {
        let mut out = Vec::new();
        encode_header(&mut out);
        encode_configuration(&self.peer.configuration, &mut out);
        match self.peer.has_return_path {
            true => {
                Command::OpenReturnPath.encode(&mut out);
                Command::Ping(1).encode(&mut out);
            }
            false => Command::EnableColo.encode(&mut out),
        }
        encode_start(
            &SectionName { id: RAM_SECTION_ID, idstr: IDSTR, instance: 0, version: VERSION },
            &mut out,
        );
        encode_block_list(&announcements(memory.table(), false, false), &mut out);
        out.extend_from_slice(&EOS_RECORD);
        self.footer(&mut out);
        self.send(&out, limit)?;
        Ok(None)
    }

    /// The secondary pauses its own guest before it answers; ours runs.
    fn open(&mut self, number: u64, limit: &Limit) -> Result<(), Error> {
        self.number = number;
        if number == 1 {
            return Ok(());
        }
        // The first record of a checkpoint names its block.
        self.pages = InlinePages::new(Arc::clone(&self.memory));
        self.send(&ColoMessage::Request.encode(), limit)?;
        match self.message(&limit.stop)? {
            Some(ColoMessage::Reply) => self.send(&ColoMessage::Send.encode(), limit),
            Some(_) => Err(out_of_turn()),
            None => Err(no_answer("that it is ready for a checkpoint", limit.after)),
        }
    }

    fn pages(&mut self, _memory: &dyn GuestMemory, batch: &PageBatch, limit: &Limit) -> Result<(), Error> {
        let mut head = Vec::new();
        encode_part(RAM_SECTION_ID, &mut head);
        self.send(&head, limit)?;
        in_time(self.pages.write(batch, &mut self.sink, &limit.stop), limit)?;
        let mut end = EOS_RECORD.to_vec();
        self.footer(&mut end);
        self.send(&end, limit)
    }

    /// Behind the end of RAM.
    fn state(&mut self, number: u64, state: &[u8], limit: &Limit) -> Result<(), Error> {
        let without = without_devices(self.memory.table().page().bytes());
        let state = if state.is_empty() { &without } else { state };
        let mut head = Vec::new();
        encode_end(RAM_SECTION_ID, &mut head);
        head.extend_from_slice(&EOS_RECORD);
        self.footer(&mut head);
        let mut sections = state;
        if number > 1 {
            encode_eof(&mut head);
            // With the end of file, without the VM description.
            let end = sections_end(state, Framing::default()).map_or(state.len(), |at| at + 1);
            sections = state.get(..end).unwrap_or(state);
            encode_size(sections.len() as u64, &mut head);
        }
        put(&mut self.sink, &[SendPart::Own(&head), SendPart::Own(sections)], limit)
    }

    fn close(&mut self, _number: u64, _pages: u64, limit: &Limit) -> Result<(), Error> {
        in_time(self.sink.flush(&limit.stop), limit)
    }

    fn renew(&mut self, _number: u64, _time: Duration, _limit: &Limit) -> Result<(), Error> {
        Ok(())
    }

    fn release(&mut self, _limit: &Limit) -> Result<(), Error> {
        self.is_released = true;
        Ok(())
    }

    fn next(&mut self, stop: &Stop) -> Result<Option<StandbyMessage>, Error> {
        if self.is_released {
            // It can't be told, and does not answer.
            return Ok(Some(StandbyMessage::Released));
        }
        match (self.message(stop)?, self.number) {
            (None, _) => Ok(None),
            (Some(ColoMessage::Ready), 1) => Ok(Some(StandbyMessage::Confirm(1))),
            (Some(ColoMessage::Received), 2..) => Ok(None),
            (Some(ColoMessage::Loaded), number @ 2..) => Ok(Some(StandbyMessage::Confirm(number))),
            _ => Err(out_of_turn()),
        }
    }

    fn is_silent(&self) -> bool {
        self.back.is_none()
    }

    fn forget_answers(&mut self) {
        self.back = None;
    }

    fn position(&self) -> u64 {
        self.sink.position()
    }
}
