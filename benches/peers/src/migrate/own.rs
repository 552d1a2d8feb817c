//! ramwire's own run: two sessions in two processes, as in an embedder or the command.
//!
//! No guest writes the memory and no dirty log runs, as with the stopped QEMUs that it is compared with.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use ramwire::engine::{Ending, Outcome};
use ramwire::error::Chain;
use ramwire::guest::{MappedGuest, TestMachine};
use ramwire::observe::Statistics;
use ramwire::page::ZeroDetection;
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    DestinationGuest, DestinationSession, DestinationSettings, SourceGuest, SourceReport, SourceSession,
    SourceSettings, Verify,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{Mapping, Stop};
use ramwire::transport::{
    Address, ChannelOptions, ConnectionOptions, Listener, PageSending, Tls, TlsError, TlsOptions, open_source,
};
use ramwire::units::PageSize;

use super::Run;
use super::bed::{self, Bed};
use super::cost::Cost;
use super::peer::{Peer, Role};
use crate::BenchError;

/// A VM without devices. Only the migration accesses its memory.
pub fn standing_still() -> TestMachine {
    TestMachine::default().keeping_memory()
}

/// The memory as one block.
///
/// # Errors
/// [`BenchError::Refused`].
pub fn guest(mapping: &Mapping) -> Result<Arc<MappedGuest>, BenchError> {
    let failed = |error: &dyn std::fmt::Display| BenchError::Refused {
        who: "ramwire".into(),
        what: "its memory".into(),
        answer: error.to_string(),
    };
    let name = BlockName::new("bench").map_err(|error| failed(&error))?;
    let block = RamBlock::new(name, mapping.region().len());
    let builder = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping);
    Ok(Arc::new(builder.build().map_err(|error| failed(&error))?))
}

/// How ramwire moves the memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Way {
    /// Page channels; 0: pages in the stream.
    #[arg(long, default_value = "0")]
    pub channels: u8,
    /// Over a UNIX socket instead of TCP.
    #[arg(long)]
    pub unix: bool,
    /// Without looking for zero pages.
    #[arg(long)]
    pub whole: bool,
    /// With `--verify fast`.
    #[arg(long)]
    pub fast: bool,
    /// How pages on channels are sent.
    #[arg(long, default_value_t)]
    pub sending: PageSending,
}

/// Migrates the bed's memory to another process.
///
/// # Errors
/// [`BenchError`].
pub fn run(bed: &Bed, way: Way) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = guest(&mapping)?;
    let peer = Peer::start(Role::Ramwire, bed, way, None)?;
    let address = match bed.tls() {
        Some(folder) => peer.address.clone().with_tls(Tls::of_source(&certificates(folder)).map_err(no_tls)?),
        None => peer.address.clone(),
    };
    let (begun, before) = (Instant::now(), cost()?);
    let report = send(&address, memory, way)?;
    let (seconds, source) = (begun.elapsed().as_secs_f64(), Some(cost()?.since(before)));
    if report.outcome != Outcome::Completed {
        let answer =
            report.error.map_or_else(|| format!("{:?}", report.outcome), |error| Chain(&error).to_string());
        return Err(BenchError::Refused { who: "ramwire".into(), what: "to migrate".into(), answer });
    }
    let (destination, downtime_ms) = (Some(peer.finish()?), Some(report.statistics.downtime));
    let seconds = seconds - compared(&report.statistics, way);
    Ok(Run { seconds, source, destination, downtime_ms, ..Run::default() })
}

/// The certificates of both ends; a UNIX socket's destination is `localhost`.
pub fn certificates(folder: &Path) -> TlsOptions {
    let mut options = TlsOptions::in_dir(folder);
    options.hostname = Some("localhost".into());
    options
}

/// Certificates that can't be used.
pub fn no_tls(error: TlsError) -> BenchError {
    BenchError::Refused { who: "ramwire".into(), what: "TLS".into(), answer: Chain(&error).to_string() }
}

/// Seconds that the source took to compare its memory after the hand-over: the guest runs at the destination by then.
fn compared(statistics: &Statistics, way: Way) -> f64 {
    let rounds: f64 = statistics.rounds.iter().map(|round| round.took_ms).sum();
    let rest = statistics.total_time - statistics.setup_time - rounds;
    if way.fast { rest.max(0.0) / 1e3 } else { 0.0 }
}

fn cost() -> Result<Cost, BenchError> {
    let failed = |source| BenchError::Io { who: "ramwire".into(), doing: "counting its cost", source };
    Cost::own().map_err(failed)
}

fn options(way: Way) -> ConnectionOptions {
    let mut channels = ChannelOptions::default();
    channels.count = way.channels;
    channels.sending = way.sending;
    let mut options = ConnectionOptions::default();
    options.channels = channels;
    options
}

fn send(address: &Address, memory: Arc<MappedGuest>, way: Way) -> Result<SourceReport, BenchError> {
    let stop = Stop::never();
    let connection = open_source(address, memory.clone(), &options(way), &stop)?;
    let source = SourceGuest { memory, dirty: Vec::new(), control: Box::new(standing_still()) };
    let configuration = Configuration { machine: "none".into(), ..Configuration::default() };
    let mut settings = SourceSettings::new(configuration);
    settings.guest_is_paused = true;
    if way.whole {
        settings.zero_detection = ZeroDetection::None;
    }
    if way.fast {
        settings.verify = Verify::Fast;
    }
    Ok(SourceSession::new(source, connection, settings).run())
}

/// The receiving side, in the other process.
///
/// # Errors
/// [`BenchError`].
pub fn receive(listener: &mut Listener, mapping: &Mapping, way: Way) -> Result<(), BenchError> {
    let who = || "ramwire's destination".to_owned();
    let stop = Stop::never();
    let connection = listener.accept_connection(&options(way), &stop)?;
    let memory = Box::new(guest(mapping)?);
    let settings = DestinationSettings::default();
    let session = DestinationSession::new(
        DestinationGuest { memory, control: Box::new(standing_still()) },
        connection,
        settings,
    );
    let report = session.run();
    if report.ending == Ending::Running {
        return Ok(());
    }
    let answer =
        report.error.map_or_else(|| format!("{:?}", report.ending), |error| Chain(&error).to_string());
    Err(BenchError::Refused { who: who(), what: "to receive".into(), answer })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::migrate::Populated;
    use crate::migrate::bed::{Fill, Memory};
    use ramwire::transport::AllowList;

    #[test]
    fn the_destination_ends_up_with_the_same_memory() {
        let base = tempfile::tempdir().unwrap();
        let bed = Bed::make(base.path(), 6 << 20, Fill::Mixed(70), Populated::Yes, Memory::Shared).unwrap();
        for (channels, whole, fast, sending) in [
            (0, false, false, PageSending::Copy),
            (3, false, true, PageSending::Copy),
            (2, false, false, PageSending::Splice),
            (0, true, false, PageSending::Copy),
        ] {
            let way = Way { channels, whole, fast, sending, ..Way::default() };
            bed.clear_destination().unwrap();
            let address = "tcp:127.0.0.1:0".parse().unwrap();
            let stop = Stop::never();
            let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
            let address = listener.address().clone();
            let target = bed::map(&bed.destination(), bed.bytes(), true).unwrap();
            let receiver = std::thread::spawn(move || receive(&mut listener, &target, way));
            let memory = guest(&bed::map(&bed.source(), bed.bytes(), true).unwrap()).unwrap();
            let report = send(&address, memory, way).unwrap();
            receiver.join().unwrap().unwrap();
            assert_eq!(report.outcome, Outcome::Completed);
            assert_eq!(bed.difference().unwrap(), None, "{way:?}");
            assert_eq!(report.statistics.pages.zero > 0, !whole, "{way:?}");
        }
    }
}
