//! How a stream begins: header, kind of the peer, list of blocks.
//!
//! A ramwire and a QEMU both answer the ordinary PING as soon as they read, a ramwire identifies itself first. So the
//! peer's answers show its kind, and no time limit decides it. A destination that is connected but does not read yet,
//! since its VM is still being made, is waited for; one that stays silent ends the migration before a page is sent.

use crate::engine::{Handover, SourceEvent};
use crate::error::Remedy;
use crate::ram::{BlockFlags, RamBlock, RamBlockTable, RoundKind};
use crate::stream::native::{
    GREETING, Hello, MAX_CONFIGURATION_PART, MIN_VERSION, Order, VMM_CONFIGURATION_VERSION, channels_ping,
    version_of_pong,
};
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::section::{SectionName, encode_start};
use crate::stream::qemu::style::PeerStyle;
use crate::stream::qemu::{file, ram};
use crate::sys::Stop;
use crate::units::{GuestAddr, PageSize};

use super::SourceSession;
use super::fingerprints::refuse_verify;
use super::passing::not_its_memory;
use super::peer::refuse_verdict;
use super::postcopy::no_answers_for_postcopy;
use super::return_path::{PeerMessage, check_deadline};
use crate::session::config::{SourceSettings, Verify};
use crate::session::digest::Digest;
use crate::session::{Error, ErrorKind, Peer};

/// Our own section id: above every id a QEMU gives, so that it differs from all in a forwarded tail.
pub(in crate::session) const RAM_SECTION_ID: u32 = 0x5257_0001;

/// The value of the ordinary PING, the one a QEMU source sends.
pub(super) const ORDINARY_PING: u32 = 1;

impl SourceSession {
    /// Header and greeting.
    pub(super) fn greet(&mut self) -> Result<SourceEvent, Error> {
        let mut head = Vec::new();
        file::encode_header(&mut head);
        if self.settings.framing.configuration {
            file::encode_configuration(&self.settings.configuration, &mut head);
        } else if !has_only_a_name(&self.settings.configuration) {
            return Err(Error::Config {
                what: "this guest's capabilities, page size or UUID can't be sent without a configuration \
                    section"
                    .into(),
                remedy: Remedy::Advice("send one (SourceSettings::framing)"),
            });
        }
        if self.wire.back.is_some() {
            Command::OpenReturnPath.encode(&mut head);
            if self.greets() {
                Command::Ping(GREETING).encode(&mut head);
                Command::Ping(channels_ping(self.wire.link.page_channels())).encode(&mut head);
            }
            Command::Ping(ORDINARY_PING).encode(&mut head);
        }
        self.wire.send(&head)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        Ok(SourceEvent::Done)
    }

    /// The kind of the peer is found out by its answers.
    fn greets(&self) -> bool {
        self.wire.back.is_some() && self.settings.peer.is_none_or(|peer| peer == Peer::Ramwire)
    }

    /// The kind of the peer, and the block list.
    pub(super) fn send_setup(&mut self) -> Result<SourceEvent, Error> {
        let handover = if self.greets() { self.find_out_peer()? } else { self.driver.engine.handover() };
        self.refuse_verify(handover, "the destination is a QEMU")?;
        self.refuse_spreading(handover)?;
        if !self.settings.vmm_configuration.is_empty() && handover != Handover::Native {
            return Err(no_vmm_configuration("the destination is a QEMU"));
        }
        self.tell_if_not_replaceable(handover);
        let style = match handover {
            Handover::Native => Some(PeerStyle::RAMWIRE),
            _ => self.settings.style,
        };
        self.wire.link.set_peer_style(style)?;
        self.advise()?;
        self.announce_blocks()?;
        self.wire.link.open_round(RoundKind::Setup, &self.wire.stop)?;
        self.wire.link.close_round(RoundKind::Setup, &self.wire.stop)?;
        let mut end = ram::EOS_RECORD.to_vec();
        self.settings.framing.encode_footer(self.settings.ram_section, &mut end);
        end.extend_from_slice(&self.settings.early_sections);
        self.wire.send(&end)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        self.send_fence()?;
        self.await_first_fence()?;
        if self.settings.verify == Verify::Full && handover == Handover::Native {
            self.estimate_digest()?;
        }
        let position = self.wire.position();
        self.figures.channel_bytes(self.wire.channel_bytes());
        self.figures.set_up(self.driver.clock.now(), position);
        Ok(SourceEvent::SetUp { handover })
    }

    /// The digest is made while the guest is paused: it counts against the downtime limit.
    fn estimate_digest(&mut self) -> Result<(), Error> {
        let before = self.driver.clock.now();
        let share =
            Digest::sample((&self.guest.memory, self.pages.skips.unsent().clone()), &self.settings.spawner)?;
        let took = self.driver.clock.now().saturating_sub(before);
        // The other end makes its own at the same time.
        let ends = if self.settings.same_host { 2 } else { 1 };
        if share > 0.0 {
            self.convergence.fixed.digest = took.div_f64(share) * ends;
        }
        Ok(())
    }

    /// A requested feature that no peer on this connection can provide is refused before the first byte.
    pub(super) fn refuse_unsupported(&self) -> Result<(), Error> {
        refuse_unanswered(&self.settings, self.wire.back.is_some())
    }

    /// A QEMU does not report how many page channels it waits for: it closes, or sends nothing. It closes its page
    /// channels as soon as it knows, so that the first round notices it at the latest.
    pub(super) fn blame_channels(&self, error: Error) -> Error {
        let channels = self.wire.link.page_channels();
        let may_differ = channels > 0
            && self.driver.engine.handover() != Handover::Native
            && self.driver.engine.round() <= 1
            && !self.driver.engine.is_last_round();
        match error.kind() {
            ErrorKind::Channel if may_differ => {
                Error::NotSetUp { channels: usize::from(channels), source: Box::new(error) }
            }
            _ => error,
        }
    }

    /// Waits until the destination has identified itself, and greets a ramwire.
    fn find_out_peer(&mut self) -> Result<Handover, Error> {
        let after = self.settings.greeting_timeout;
        let silent = || Error::NoAnswer { what: "what it is", after, remedy: Remedy::RaiseGreetingTimeout };
        let answered = self.await_greeting(&self.wire.stop.within(after));
        match (
            answered.map_err(|error| if error.is_deadline() { silent() } else { error })?,
            self.settings.peer,
        ) {
            (Peer::Ramwire, _) => self.send_hello().map(|()| Handover::Native),
            (Peer::Qemu, Some(Peer::Ramwire)) => {
                let why = "it answered the greeting like a QEMU, and a ramwire was expected".into();
                Err(Error::PeerFailed { why })
            }
            // Over RDMA a lone PING was left unread by a QEMU 10.0 on a busy machine, which waits for a completion that
            // arrived before (5 of 43 migrations; without it none of 24); and a round trip there takes no part of a
            // downtime.
            (Peer::Qemu, _) if self.wire.link.abilities().registers_memory => Ok(Handover::Shut),
            (Peer::Qemu, _) => self.measure_round_trip().map(|()| Handover::Shut),
        }
    }

    /// The greeting is answered before the ordinary PING: a peer that answers only that is a QEMU. Before it reads, it
    /// answers nothing; as long as it is silent, it may be either.
    fn await_greeting(&mut self, stop: &Stop) -> Result<Peer, Error> {
        loop {
            match self.next_message(stop)? {
                PeerMessage::Pong(ORDINARY_PING) => return Ok(Peer::Qemu),
                PeerMessage::Pong(value)
                    if version_of_pong(value).is_some_and(|version| version < MIN_VERSION) =>
                {
                    let why = "it is a ramwire of an older version, which does not report what it has placed";
                    return Err(Error::PeerFailed { why: why.into() });
                }
                PeerMessage::Pong(value) if version_of_pong(value).is_some() => return Ok(Peer::Ramwire),
                word => refuse_verdict(word)?,
            }
            check_deadline(stop)?;
        }
    }

    /// The answer to the greeting may have waited for the destination's start: a QEMU is sent another PING.
    fn measure_round_trip(&mut self) -> Result<(), Error> {
        let mut ping = Vec::new();
        Command::Ping(ORDINARY_PING).encode(&mut ping);
        self.wire.send(&ping)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        let asked = self.driver.clock.now();
        let stop = self.wire.stop.within(self.settings.stall_timeout);
        while self.next_message(&stop)? != PeerMessage::Pong(ORDINARY_PING) {
            check_deadline(&stop)?;
        }
        self.convergence.fixed.round_trip = self.driver.clock.now().saturating_sub(asked);
        Ok(())
    }

    fn next_message(&mut self, stop: &Stop) -> Result<PeerMessage, Error> {
        match &mut self.wire.back {
            Some(back) => back.next(stop),
            None => Err(Error::PeerFailed { why: "there is no return path for its answer".into() }),
        }
    }

    fn send_hello(&mut self) -> Result<(), Error> {
        let urgent = self.driver.engine.urgent().is_some();
        let passes = self.may_pass_memory();
        let verify = self.settings.verify;
        let (digest, fingerprints) = (verify == Verify::Full, verify == Verify::Fast);
        let (spread, secret) = (self.spreads(), self.resumption_secret());
        let has_memory = self.has_passed_ahead();
        let ours = Hello {
            urgent,
            passes,
            fingerprints,
            spread,
            has_memory,
            secret,
            ..Hello::ours(self.settings.migration_id, digest)
        };
        let mut order = Vec::new();
        Command::Native(Order::Hello(ours)).encode(&mut order);
        self.wire.send(&order)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        let asked = self.driver.clock.now();
        let stop = self.wire.stop.within(self.settings.stall_timeout);
        let Some(back) = &mut self.wire.back else { return Ok(()) };
        let answer = back.next_verdict(&stop)?;
        self.convergence.fixed.round_trip = self.driver.clock.now().saturating_sub(asked);
        match answer {
            PeerMessage::Hello(theirs) if theirs.common_version() != Some(theirs.max_version) => {
                let why = format!("it speaks version {} of ramwire's messages", theirs.max_version);
                Err(Error::PeerFailed { why })
            }
            // The peer returns the fields that it received: a lost digest flag would let it start the guest unchecked.
            PeerMessage::Hello(theirs)
                if (theirs.migration_id, theirs.digest) != (ours.migration_id, ours.digest) =>
            {
                Err(Error::PeerFailed { why: "it received another HELLO than was sent".into() })
            }
            PeerMessage::Hello(theirs) if theirs.urgent != urgent => Err(Error::Config {
                what: "urgent pages were to have a connection of their own, and the destination is an older ramwire".into(),
                remedy: Remedy::Advice("let them go with the others, or take the same version at both ends"),
            }),
            PeerMessage::Hello(theirs) if theirs.spread != spread => Err(Error::Config {
                what: "postcopy was asked for with page channels, and the destination is an older ramwire".into(),
                remedy: Remedy::Advice("leave the page channels out, or take the same version at both ends"),
            }),
            // Else it would start the guest in memory of its own, which is empty.
            PeerMessage::Hello(theirs) if theirs.has_memory != has_memory => Err(not_its_memory()),
            PeerMessage::Hello(theirs) if theirs.passes && !passes => {
                Err(Error::PeerFailed { why: "it takes memory that was not offered".into() })
            }
            PeerMessage::Hello(theirs) if theirs.secret.is_some() && secret.is_none() => {
                Err(Error::PeerFailed { why: "it waits for further connections, which nobody asked for".into() })
            }
            PeerMessage::Hello(theirs) => {
                self.agree_on_resumption(theirs.secret);
                self.agree_on_fingerprints(theirs.fingerprints, theirs.max_version)?;
                self.send_vmm_configuration(theirs.max_version)?;
                if theirs.passes {
                    self.pass_memory()?;
                }
                // Memory that is passed has none.
                self.begin_fingerprints();
                Ok(())
            }
            word => refuse_verdict(word),
        }
    }

    /// Before the list of blocks, with which the destination's VMM provides memory.
    fn send_vmm_configuration(&mut self, version: u16) -> Result<(), Error> {
        if self.settings.vmm_configuration.is_empty() {
            return Ok(());
        }
        if version < VMM_CONFIGURATION_VERSION {
            return Err(no_vmm_configuration("the destination is an older ramwire"));
        }
        let mut out = Vec::new();
        for part in self.settings.vmm_configuration.chunks(MAX_CONFIGURATION_PART) {
            Command::Native(Order::VmmConfiguration { part }).encode(&mut out);
        }
        Ok(self.wire.send(&out)?)
    }

    fn announce_blocks(&mut self) -> Result<(), Error> {
        let mut out = Vec::new();
        let name = SectionName {
            id: self.settings.ram_section,
            idstr: ram::IDSTR,
            instance: 0,
            version: ram::VERSION,
        };
        encode_start(&name, &mut out);
        let with_addresses = self.settings.configuration.has(file::IGNORE_SHARED);
        let with_host_pages = self.settings.postcopy.is_some();
        let list = announcements(self.guest.memory.table(), with_addresses, with_host_pages);
        encode_block_list(&list, &mut out);
        Ok(self.wire.send(&out)?)
    }
}

/// Without a configuration section a destination takes everything in it but the name for absent.
fn has_only_a_name(configuration: &Configuration) -> bool {
    *configuration == Configuration { machine: configuration.machine.clone(), ..Configuration::default() }
}

/// Commands before the last ram section.
pub(super) fn before_last_section(session: &SourceSession, out: &mut Vec<u8>) {
    let style = session.settings.style.unwrap_or(PeerStyle::QEMU_7_2);
    if style.switchover_start && session.driver.engine.handover() != Handover::Native {
        Command::SwitchoverStart.encode(out);
    }
}

/// If postcopy may follow, a block is announced with the size of its host pages, unless it is the ordinary one.
pub(in crate::session) fn announcements(
    table: &RamBlockTable,
    with_addresses: bool,
    with_host_pages: bool,
) -> Vec<BlockAnnouncement> {
    let ordinary = PageSize::SIZE_4K.max(table.page());
    let announce = |block: &RamBlock| BlockAnnouncement {
        name: block.name.clone(),
        used_length: block.used_length,
        host_page: Some(block.host_page).filter(|page| with_host_pages && *page != ordinary),
        guest_addr: with_addresses.then(|| block.guest_addr.unwrap_or(GuestAddr(0))),
    };
    table.blocks().iter().map(announce).collect()
}

/// The blocks a peer announced, as a table of this guest would describe them.
pub(crate) fn described(announced: &BlockAnnouncement) -> RamBlock {
    let mut block = RamBlock::new(announced.name.clone(), announced.used_length);
    block.host_page = announced.host_page.unwrap_or(block.host_page);
    block.guest_addr = announced.guest_addr;
    block.flags = BlockFlags::default();
    block
}

impl SourceSettings {
    /// What a session with these settings refuses in any case, before its first byte. For a caller that must not open
    /// a connection in vain. `answers`: the connection carries the destination's answers
    /// ([`Address::carries_answers`](crate::transport::Address::carries_answers)).
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check(&self, answers: bool) -> Result<(), Error> {
        refuse_unanswered(self, answers)?;
        if self.postcopy.is_some() && !answers { Err(no_answers_for_postcopy()) } else { Ok(()) }
    }
}

/// What only a ramwire, or a destination that answers, can do.
fn refuse_unanswered(settings: &SourceSettings, answers: bool) -> Result<(), Error> {
    let why = match settings.peer {
        Some(Peer::Qemu) => "the destination is a QEMU",
        _ if !answers => "the connection carries no answers",
        _ => return Ok(()),
    };
    refuse_verify(settings.verify, why)?;
    if settings.vmm_configuration.is_empty() { Ok(()) } else { Err(no_vmm_configuration(why)) }
}

fn no_vmm_configuration(why: &str) -> Error {
    Error::Config {
        what: format!("this VMM's configuration was to be sent to the destination's, and {why}"),
        remedy: Remedy::Advice(
            "migrate to a ramwire of the same version over a connection of both directions, or leave the configuration out \
             (SourceSettings::vmm_configuration)",
        ),
    }
}
