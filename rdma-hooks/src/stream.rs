//! The byte stream and the requests over one queue pair: a sending half and a receiving half.
//!
//! The source's end of the main queue pair and the destination's end of the return path send; the other ends receive.

use std::collections::VecDeque;
use std::io::Read;

use crate::channel::Channel;
use crate::control::{Kind, Message, STREAM_PAYLOAD_BYTES, header};
use crate::exchange::{Receiver, Sender, SenderEvent, Turn};
use crate::hooks::HooksError;
use crate::stop::Stop;

/// Sends bytes and requests against READY credits.
pub(crate) struct StreamSender {
    pub(crate) channel: Channel,
    /// Additional queue pairs, which this end polls while it waits.
    pub(crate) data_queues: Vec<Channel>,
    exchange: Sender,
    replies: VecDeque<Message<'static>>,
    buffer: Vec<u8>,
    scratch: Vec<u8>,
    peer_is_done: bool,
}

impl StreamSender {
    pub(crate) fn new(channel: Channel, window: u16) -> Self {
        Self {
            channel,
            data_queues: Vec::new(),
            exchange: Sender::new(window),
            replies: VecDeque::new(),
            buffer: Vec::with_capacity(STREAM_PAYLOAD_BYTES),
            scratch: Vec::new(),
            peer_is_done: false,
        }
    }

    /// Processes completions and messages; true if there were any.
    pub(crate) fn pump(&mut self) -> Result<bool, HooksError> {
        let news = self.channel.pump()?;
        self.judge_arrived()?;
        Ok(news)
    }

    fn judge_arrived(&mut self) -> Result<(), HooksError> {
        while let Some(slot) = self.channel.take_arrived() {
            let message = match Message::decode(self.channel.received(slot))? {
                Message::Stream(_) => return Err(HooksError::unexpected(Kind::Stream, "sending the stream")),
                message => message.into_owned(),
            };
            match self.exchange.on_arrival(message.kind())? {
                SenderEvent::Ready => {}
                SenderEvent::Reply(_) => self.replies.push_back(message),
                SenderEvent::Done => self.peer_is_done = true,
            }
            self.channel.repost(slot)?;
        }
        Ok(())
    }

    /// Pumps until `ready` has an answer.
    pub(crate) fn wait_for<T>(
        &mut self,
        stop: &Stop,
        mut ready: impl FnMut(&mut Self) -> Option<T>,
    ) -> Result<T, HooksError> {
        loop {
            let news = self.pump()?;
            if let Some(answer) = ready(self) {
                return Ok(answer);
            }
            if !news {
                self.rest(stop)?;
            }
        }
    }

    /// Sleeps briefly; polls the other queue pairs meanwhile.
    pub(crate) fn rest(&mut self, stop: &Stop) -> Result<(), HooksError> {
        let now = self.channel.clock_read_at();
        self.data_queues.iter_mut().try_for_each(|channel| channel.watch(now))?;
        self.channel.rest(stop)
    }

    /// Waits for a credit and sends a message against it; returns its number.
    pub(crate) fn send(&mut self, message: &Message<'_>, stop: &Stop) -> Result<u64, HooksError> {
        self.channel.ring()?;
        self.wait_for(stop, |sender| sender.exchange.has_credit().then_some(()))?;
        let mut bytes = std::mem::take(&mut self.scratch);
        bytes.clear();
        message.encode(&mut bytes);
        let sent = self.channel.send(&[&bytes], stop);
        self.scratch = bytes;
        sent?;
        self.exchange.send(message.kind()).ok_or(HooksError::OutOfOrder("a message without credit"))
    }

    /// True if a message can be sent without waiting.
    pub(crate) fn has_credit(&self) -> bool {
        self.exchange.has_credit()
    }

    /// True if a message can be sent without waiting for credit, room or a buffer.
    pub(crate) fn can_send_now(&self) -> bool {
        self.has_credit() && self.channel.can_send_now()
    }

    /// The answer to the oldest open request, if it has arrived.
    pub(crate) fn take_reply(&mut self) -> Option<Message<'static>> {
        self.replies.pop_front()
    }

    /// Waits for the answer to a request that was sent.
    pub(crate) fn reply(&mut self, stop: &Stop) -> Result<Message<'static>, HooksError> {
        self.wait_for(stop, |sender| sender.replies.pop_front())
    }

    /// True if the peer has processed message number `message`.
    pub(crate) fn is_finished(&self, message: u64) -> bool {
        self.exchange.is_finished(message)
    }

    /// Appends bytes to the stream; full messages are sent at once.
    pub(crate) fn write(&mut self, mut bytes: &[u8], stop: &Stop) -> Result<(), HooksError> {
        while !bytes.is_empty() {
            let room = STREAM_PAYLOAD_BYTES - self.buffer.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == STREAM_PAYLOAD_BYTES {
                self.flush(stop)?;
            }
        }
        Ok(())
    }

    /// Sends the buffered bytes.
    pub(crate) fn flush(&mut self, stop: &Stop) -> Result<(), HooksError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        self.channel.ring()?;
        self.wait_for(stop, |sender| sender.exchange.has_credit().then_some(()))?;
        let head = header(Kind::Stream, self.buffer.len(), 0);
        self.channel.send(&[&head, &self.buffer], stop)?;
        self.channel.counters.stream_bytes += self.buffer.len() as u64;
        self.buffer.clear();
        self.exchange.send(Kind::Stream).ok_or(HooksError::OutOfOrder("stream bytes without credit"))?;
        Ok(())
    }

    /// True if the peer has sent Done.
    pub(crate) fn peer_is_done(&self) -> bool {
        self.peer_is_done
    }
}

/// Receives bytes and requests, granting READY credits.
pub(crate) struct StreamReceiver {
    pub(crate) channel: Channel,
    /// Additional queue pairs, which this end polls while it waits.
    pub(crate) data_queues: Vec<Channel>,
    exchange: Receiver,
    /// The message being read: its buffer and the position in it.
    current: Option<(usize, usize)>,
    /// Stream bytes that shared a message with a round's mark and come after it.
    leftover: VecDeque<u8>,
}

impl StreamReceiver {
    pub(crate) fn new(channel: Channel, exchange: Receiver) -> Self {
        Self { channel, data_queues: Vec::new(), exchange, current: None, leftover: VecDeque::new() }
    }

    /// Grants every credit there is a free buffer for.
    pub(crate) fn grant(&mut self, stop: &Stop) -> Result<(), HooksError> {
        while self.exchange.grant() {
            self.channel.send(&[&header(Kind::Ready, 0, 1)], stop)?;
        }
        Ok(())
    }

    /// True if there is a message or stream data that can be read without waiting.
    pub(crate) fn has_input(&mut self) -> Result<bool, HooksError> {
        self.channel.pump()?;
        Ok(self.current.is_some() || self.channel.has_arrived())
    }

    /// Waits for the next message; returns its buffer, which is returned with [`finish`](Self::finish).
    fn next(&mut self, stop: &Stop) -> Result<usize, HooksError> {
        self.grant(stop)?;
        loop {
            let news = self.channel.pump()?;
            if self.channel.has_arrived() {
                break;
            }
            if !news {
                let now = self.channel.clock_read_at();
                self.data_queues.iter_mut().try_for_each(|channel| channel.watch(now))?;
                self.channel.rest(stop)?;
            }
        }
        let slot = self.channel.take_arrived().ok_or(HooksError::OutOfOrder("no message"))?;
        let kind = Message::decode(self.channel.received(slot))?.kind();
        self.exchange.on_arrival(kind)?;
        Ok(slot)
    }

    fn finish(&mut self, slot: usize) -> Result<(), HooksError> {
        self.exchange.finish();
        self.channel.repost(slot)
    }

    /// Reads at least one byte of the stream, at most what fits.
    pub(crate) fn read(&mut self, into: &mut [u8], stop: &Stop) -> Result<usize, HooksError> {
        if into.is_empty() {
            return Ok(0);
        }
        if !self.leftover.is_empty() {
            return Ok(self.leftover.read(into).unwrap_or(0));
        }
        let (slot, at) = match self.current.take() {
            Some(current) => current,
            None => (self.next(stop)?, 0),
        };
        let message = Message::decode(self.channel.received(slot))?;
        Receiver::judge(message.kind(), Turn::Stream)?;
        let Message::Stream(bytes) = message else {
            return Err(HooksError::unexpected(message.kind(), "reading the stream"));
        };
        let rest = bytes.get(at..).unwrap_or_default();
        let count = rest.len().min(into.len());
        let end = count == rest.len();
        into[..count].copy_from_slice(&rest[..count]);
        if end {
            self.finish(slot)?;
        } else {
            self.current = Some((slot, at + count));
        }
        self.channel.counters.stream_bytes += count as u64;
        Ok(count)
    }

    /// Waits for the next request of a round. It counts as processed at [`done`](Self::done).
    pub(crate) fn request(&mut self, stop: &Stop) -> Result<(usize, Message<'static>), HooksError> {
        if let Some((slot, at)) = self.current.take() {
            if let Message::Stream(bytes) = Message::decode(self.channel.received(slot))? {
                self.leftover.extend(bytes.get(at..).unwrap_or_default());
            }
            self.finish(slot)?;
        }
        let slot = self.next(stop)?;
        let message = Message::decode(self.channel.received(slot))?;
        Receiver::judge(message.kind(), Turn::Round)?;
        Ok((slot, message.into_owned()))
    }

    /// Answers the request, if there is an answer, and frees its buffer.
    pub(crate) fn done(
        &mut self,
        slot: usize,
        reply: Option<&Message<'_>>,
        stop: &Stop,
    ) -> Result<(), HooksError> {
        if let Some(reply) = reply {
            let mut bytes = Vec::new();
            reply.encode(&mut bytes);
            self.channel.send(&[&bytes], stop)?;
        }
        self.finish(slot)
    }

    /// Sends Done to the sender: everything was read.
    pub(crate) fn send_done(&mut self, stop: &Stop) -> Result<(), HooksError> {
        self.channel.send(&[&header(Kind::Done, 0, 1)], stop)
    }
}
