//! What a destination receives: the stream's bytes, event by event, and the source's native messages.

use std::sync::Arc;

use crate::engine::DestinationEvent;
use crate::error::Remedy;
use crate::ram::RamBlock;
use crate::stream::native::{Answer, GREETING, Hello, MAX_VERSION, Order, hello_pong};
use crate::stream::qemu::blocks::BlockAnnouncement;
use crate::stream::qemu::command::Command;
use crate::stream::qemu::incoming::{Event, SectionKind, Seen, Step};
use crate::stream::qemu::ram::PAGE_HEAD;
use crate::stream::qemu::return_path::Message;
use crate::stream::qemu::section::Phase;
use crate::sys::RecvPart;
use crate::transport::ReadHints;

use super::ingest::Placement;
use super::reader::StreamReader;
use super::{DestinationSession, Incoming};
use crate::session::callback::named;
use crate::session::source::described;
use crate::session::{Breakage, Error, shared_blocks};

impl DestinationSession {
    /// Reads until something is to be decided.
    pub(super) fn receive(&mut self, reader: &mut StreamReader) -> Result<DestinationEvent, Error> {
        // The last item was a page, so more of them follow. Not in the last section: the source's guest waits for its
        // end. Not where a thread may wait for the page: behind that one nothing need follow.
        let mut bulk = false;
        loop {
            let StreamReader { stream, buffer, start, end, .. } = reader;
            match stream.next(&buffer[*start..*end])? {
                Step::Event { consumed, event } => {
                    let (raw, rest) = buffer[*start..*end].split_at(consumed);
                    let at = stream.position() - consumed as u64;
                    if let Event::Page { block, offset, bytes } = event {
                        let following = stream.take_following(rest, block, offset);
                        let rest = &rest[..following as usize * (PAGE_HEAD + bytes.len())];
                        let placing = self.ingest.placing()?;
                        placing.pages(block, offset, bytes, rest).map_err(|error| error.at(at))?;
                        *start += consumed + rest.len();
                        bulk = self.ingest.sections().pages_follow() && !self.switch.awaits_stream();
                        continue;
                    }
                    bulk = false;
                    let seen = *stream.seen();
                    self.ingest.note(&event);
                    let input = self.take(event, raw, seen).map_err(|error| error.at(at))?;
                    *start += consumed;
                    if let Some(input) = input {
                        if input == DestinationEvent::Tail {
                            self.ingest.device_sections(stream.tail().bytes());
                        }
                        return Ok(input);
                    }
                }
                Step::NeedMore { consumed, needed } => {
                    *start += consumed;
                    self.ingest.between_reads()?;
                    reader.make_room(needed);
                    let (may_be_silent, stop) = self.next_read(reader.start == reader.end);
                    let source = self.wire.link.stream();
                    source.set_hints(ReadHints { bulk, may_be_silent, ..ReadHints::default() });
                    let got = match source.recv(&mut [RecvPart::Own(&mut reader.buffer[reader.end..])], &stop)
                    {
                        Ok(got) => got,
                        Err(error) => {
                            let error = self.silence_of_source(error.into());
                            self.look_for_source(error)?;
                            continue;
                        }
                    };
                    self.resumption.heard();
                    if got == 0 {
                        return self.stream_ended(reader);
                    }
                    reader.end += got;
                    reader.at += got as u64;
                    self.figures.stream(reader.at);
                }
            }
        }
    }

    /// The source closed the connection. A tail may end so if its description is suppressed; but a source with a return
    /// path that does not wait for our message has given up, and its guest may continue there.
    fn stream_ended(&mut self, reader: &mut StreamReader) -> Result<DestinationEvent, Error> {
        let inside = if self.ingest.placed().is_none() { "the setup" } else { "RAM or device state" };
        let truncated = Error::Truncated { at: reader.at, inside };
        let waits_for_us = self.driver.engine.is_native() || self.reported.return_path;
        let whole = reader.stream.finish().is_ok();
        // A tail without its description may be all that the source writes.
        self.reported.left = !waits_for_us && !whole;
        if waits_for_us || !whole || !self.settings.accept_missing_description {
            return Err(truncated);
        }
        self.ingest.device_sections(reader.stream.tail().bytes());
        Ok(DestinationEvent::Tail)
    }

    /// Applies an event to memory, and returns its meaning for the engine. `raw` are the bytes it took, `seen` is what
    /// the stream has shown so far.
    fn take(&mut self, event: Event<'_>, raw: &[u8], seen: Seen) -> Result<Option<DestinationEvent>, Error> {
        let limit = self.settings.max_state;
        match event {
            Event::Page { block, offset, bytes } => {
                self.ingest.placing()?.pages(block, offset, bytes, &[])?
            }
            Event::Zero { block, offset } => self.ingest.placing()?.zero(block, offset)?,
            Event::Compressed { block, offset, bytes } => {
                self.ingest.placing()?.compressed(block, offset, bytes)?
            }
            Event::Xbzrle { block, offset, bytes } => self.ingest.placing()?.delta(block, offset, bytes)?,
            Event::Configuration(configuration) => self.reported.configuration = Some(configuration),
            Event::Blocks(blocks) => self.blocks(&blocks)?,
            Event::Command(command) => return self.command(command),
            Event::SectionStart { kind: SectionKind::Ram, phase: phase @ (Phase::Part | Phase::End), id } => {
                tracing::trace!(?phase, "pages begin");
                self.ingest.pages_begin(seen, id)?;
            }
            Event::MultifdFlush => self.barrier()?,
            Event::RecordsEnd => self.records_ended(seen)?,
            Event::SectionEnd { kind: SectionKind::Ram, phase: Phase::End } => self.ram_complete()?,
            Event::SectionStart { kind: SectionKind::Ram | SectionKind::NativeState, .. }
            | Event::SectionEnd { kind: SectionKind::Ram | SectionKind::NativeState, .. } => {}
            Event::SectionBytes(bytes) if self.ingest.sections().in_native_state() => {
                self.ingest.keep(bytes, limit)?
            }
            Event::SectionStart { .. } => self.ingest.keep_start(raw, limit)?,
            Event::SectionEnd { phase: Phase::Part, .. } => self.ingest.keep_part_end(raw, limit)?,
            Event::SectionEnd { .. } | Event::VirtioMem(_) | Event::BitmapChunk | Event::SectionBytes(_) => {
                self.ingest.keep(raw, limit)?
            }
            Event::TailBytes(_) | Event::Eof => {}
            Event::Done if self.ingest.placed().is_none() => return Err(no_blocks("the end of the stream")),
            Event::Done => return Ok(Some(DestinationEvent::Tail)),
            Event::Hook { .. } => self.receive_round()?,
            Event::PackageBytes(bytes) => self.switch.package_bytes(bytes, limit)?,
            Event::PackageEnd => return Ok(Some(DestinationEvent::Package)),
            Event::MappedBlock { .. } => {
                let what = "a RAM block of a mapped-ram file (mapped:PATH reads those)";
                return Err(out_of_turn(what, "a plain stream was read"));
            }
            Event::Filled { .. } | Event::MappedBytes(_) => {
                return Err(out_of_turn("a record of another kind of migration", "a plain precopy stream"));
            }
        }
        Ok(None)
    }

    fn blocks(&mut self, announced: &[BlockAnnouncement]) -> Result<(), Error> {
        if self.ingest.placed().is_some() {
            return Ok(());
        }
        let incoming = Incoming {
            configuration: self.reported.configuration.clone().unwrap_or_default(),
            blocks: announced.iter().map(described).collect(),
            vmm_configuration: std::mem::take(&mut self.reported.vmm_configuration),
            passed: std::mem::take(&mut self.reported.passed),
            // The sections before the list.
            early_sections: self.ingest.take_state(),
            has_return_path: self.reported.return_path && self.wire.back.is_some(),
            gives_unasked: !self.reported.return_path && !self.wire.link.stream().is_stored(),
            seen: Seen::default(),
        };
        if incoming.gives_unasked && !self.breakage.is(Breakage::TrustUnasked) {
            self.driver.engine.source_gives_unasked();
        }
        self.all_was_passed(&incoming)?;
        let memory = named("calling MemoryProvider::provide", || self.guest.memory.provide(&incoming))?;
        self.switch.check_host_pages(memory.table())?;
        shared_blocks::check(&incoming, memory.table())?;
        let memory = self.accept_passed(&incoming, memory)?;
        let how = Placement {
            may_be_postcopy: self.switch.serves_here() || self.wire.link.abilities().on_demand,
            map_in_background: self.settings.map_in_background.then_some(&self.settings.spawner),
            prints: self.reported.compared.begin(memory.table(), self.reported.migration_id),
            fences: self.resumption.is_agreed(),
            breakage: self.breakage,
        };
        let known_zero = |block: &RamBlock| {
            named("calling MemoryProvider::is_zeroed", || self.guest.memory.is_zeroed(block))
        };
        self.ingest.place_in(memory, &incoming.blocks, known_zero, &how)?;
        self.announce(announced)?;
        self.prepare_reads(Arc::clone(&self.ingest.memory()?).table())?;
        self.figures_of(&incoming)?;
        self.ingest.announced(incoming);
        Ok(())
    }

    /// The figures count this guest from now on.
    fn figures_of(&mut self, incoming: &Incoming) -> Result<(), Error> {
        let placer = Arc::clone(self.ingest.placing()?.placer());
        let table = placer.memory().table();
        let ignored = |block: &RamBlock| {
            let ours = table.find(block.name.as_str()).ok().and_then(|index| table.get(index));
            ours.is_some_and(|ours| ours.flags.ignored)
        };
        let travelling = incoming.blocks.iter().filter(|block| !ignored(block));
        let total = travelling.map(|block| block.used_length).sum();
        self.figures.arriving(&placer, total, self.wire.link.live_bytes());
        Ok(())
    }

    fn ram_complete(&mut self) -> Result<(), Error> {
        tracing::trace!("pages end");
        self.ingest.stop_mapping();
        self.refuse_unread_channels()?;
        self.last_scan()?;
        self.switch.await_expected_pages(&self.wire.stop)?;
        self.figures.ram_complete();
        // After a switch the guest is handed over already.
        if self.switch.relayed().is_some() { Ok(()) } else { self.ingest.ram_complete() }
    }

    fn command(&mut self, command: Command<'_>) -> Result<Option<DestinationEvent>, Error> {
        match command {
            Command::OpenReturnPath => self.reported.return_path = true,
            Command::Ping(_) if !self.reported.return_path => {
                return Err(out_of_turn("PING", "a stream without a return path"));
            }
            Command::Ping(value) => {
                self.send_message(Message::Pong(value))?;
                self.reported.ping(value);
                if value == GREETING {
                    self.reported.greeted = true;
                    self.send_message(Message::Pong(hello_pong(MAX_VERSION)))?;
                }
            }
            // If refused now, the guest continues at its source. If refused when the source has switched over to
            // postcopy, it is paused there, and on a QEMU 7.2 until an operator continues it. Without a return path no
            // source can switch.
            Command::PostcopyAdvise { host_pages, .. }
                if self.reported.return_path && self.wire.back.is_some() =>
            {
                if !self.settings.postcopy {
                    return Err(no_postcopy());
                }
                self.advised(host_pages)?;
            }
            Command::PostcopyRamDiscard(discard) => {
                let placer = Arc::clone(self.ingest.placing()?.placer());
                // Memory that is registered for the source stays where it is.
                if self.wire.link.abilities().has_rounds {
                    self.wire.link.revoke();
                }
                self.switch.discard(discard, &placer)?
            }
            Command::RecvBitmap { block } if self.switch.is_running() => self.send_received(block)?,
            Command::RecvBitmap { block } if self.resumption.is_later => self.send_since_fence(block)?,
            Command::PostcopyResume if self.switch.is_running() => self.resume_requests()?,
            Command::Packaged { .. } if self.switch.is_advised() => {}
            Command::SwitchoverStart | Command::PostcopyAdvise { .. } | Command::PostcopyAdviseBitmaps => {}
            Command::Native(order) => return self.order(order),
            other => return Err(out_of_turn(&format!("{other:?}"), "a precopy migration")),
        }
        Ok(None)
    }

    fn order(&mut self, order: Order<'_>) -> Result<Option<DestinationEvent>, Error> {
        match order {
            Order::Hello(theirs) => {
                let Some(version) = theirs.common_version() else {
                    let what = format!("HELLO for versions {} to {}", theirs.min_version, theirs.max_version);
                    return Err(out_of_turn(&what, "a greeting"));
                };
                self.agree_on_channels()?;
                if theirs.urgent && !self.switch.takes_urgent() {
                    return Err(Error::Config {
                        what: "the source sends urgent pages on a connection of their own, and none can come here".into(),
                        remedy: Remedy::Advice(
                            "set where it comes from (DestinationSession::with_next_connection), or let the \
                            source send them \
                             with the others",
                        ),
                    });
                }
                let passes = theirs.passes && self.takes_memory();
                let has_memory = theirs.has_memory && self.reported.passed_ahead;
                let secret = self.agree_on_resumption(&Hello { passes, ..theirs });
                let answer = Hello {
                    min_version: version,
                    max_version: version,
                    passes,
                    has_memory,
                    secret,
                    ..theirs
                };
                self.reported.migration_id = Some(theirs.migration_id);
                (self.reported.passes, self.reported.spread) = (passes, theirs.spread);
                self.send_message(Message::Native(Answer::Hello(answer)))?;
                self.reported.compared.agree(theirs.fingerprints);
                let Hello { digest, fingerprints: memory_check, .. } = theirs;
                Ok(Some(DestinationEvent::Hello { digest, memory_check }))
            }
            Order::VmmConfiguration { .. }
                if self.ingest.incoming().is_some() || self.reported.migration_id.is_none() =>
            {
                Err(out_of_turn("VMM_CONFIGURATION", "a ramwire's list of RAM blocks has not come"))
            }
            Order::VmmConfiguration { part } => self.vmm_configuration(part).map(|()| None),
            Order::Memory { start, len, block } => self.take_memory(block, (start, len)).map(|()| None),
            Order::StateSent if !self.ingest.sections().ram_ended() => {
                Err(out_of_turn("STATE_SENT", "waiting for the last page"))
            }
            Order::StateSent => {
                let on_channels = self.wire.link.placed_pages();
                self.compare_counts(on_channels, "STATE_SENT")?;
                self.compare_fingerprints()?;
                Ok(Some(DestinationEvent::StateSent))
            }
            Order::Fingerprints { block, first, values } => {
                self.fingerprints(block, first, values).map(|()| None)
            }
            Order::Fence { number } => self.fence(number).map(|()| None),
            Order::ReadKeys { keys } => self.read_keys(keys).map(|()| None),
            Order::Resume(_) => Err(out_of_turn("RESUME", "a connection in use")),
            Order::MemoryCheck(_) => Err(out_of_turn("MEMORY_CHECK", "the guest does not run here yet")),
            Order::Sent { counts } => self.source_sent(counts).map(|()| None),
            Order::Unsent { .. }
                if !self.ingest.sections().ram_ended() || !self.driver.engine.is_native() =>
            {
                Err(out_of_turn("UNSENT", "waiting for the last page of a ramwire"))
            }
            Order::Unsent { block, why, ranges } => self.not_sent(block, why, ranges).map(|()| None),
            Order::Digest { first, values } => {
                let memory = self.ingest.memory()?;
                let whole = self.reported.digests.take(first, values, memory.table())?;
                Ok(whole.then_some(DestinationEvent::Digests))
            }
            Order::Commit { migration_id } if self.reported.migration_id == Some(migration_id) => {
                Ok(Some(DestinationEvent::Commit))
            }
            Order::Commit { .. } => Err(out_of_turn("COMMIT of another migration", "waiting for ours")),
        }
    }
}

impl DestinationSession {
    /// The data of the source's VMM arrives in parts.
    fn vmm_configuration(&mut self, part: &[u8]) -> Result<(), Error> {
        if (self.reported.vmm_configuration.len() + part.len()) as u64 > self.settings.max_state {
            return Err(out_of_turn("more VMM configuration than is accepted", "a greeting"));
        }
        self.reported.vmm_configuration.extend_from_slice(part);
        Ok(())
    }
}

fn no_postcopy() -> Error {
    Error::Config {
        what: "the source may switch to postcopy (capability postcopy-ram), which this destination can't do"
            .into(),
        remedy: Remedy::Advice("turn postcopy-ram off at the source and migrate again"),
    }
}

pub(super) fn no_blocks(what: &'static str) -> Error {
    out_of_turn(what, "waiting for the list of RAM blocks")
}

pub(super) fn out_of_turn(what: &str, while_doing: &'static str) -> Error {
    Error::OutOfTurn { what: what.to_owned(), at: None, while_doing }
}
