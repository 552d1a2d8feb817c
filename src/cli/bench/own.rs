//! ramwire's own run: two sessions in two processes, as an embedder or the command would hold them.
//!
//! Nobody writes the memory and no dirty log runs, as with the stopped QEMUs it is compared with.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::{GuestControl, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    DestinationSession, DestinationSettings, SourceGuest, SourceReport, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{Address, ChannelOptions, DoorOptions, Listener, open_source};
use ramwire::units::PageSize;

use super::bed::{self, Bed};
use super::peer::{Peer, Role, own_cpu_seconds};
use super::{BenchError, Run};

/// A machine that stands still and has no devices.
struct Still;

impl GuestControl for Still {
    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn save_devices(&mut self, _out: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn load_devices(&mut self, from: &mut dyn Read) -> io::Result<()> {
        io::copy(from, &mut io::sink()).map(drop)
    }
}

fn guest(mapping: &Mapping) -> Result<Arc<MappedGuest>, BenchError> {
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

/// Migrates the bed's memory to another process, over page channels if `channels` is not 0.
///
/// # Errors
/// [`BenchError`].
pub fn run(bed: &Bed, channels: u8) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = guest(&mapping)?;
    let mapped = bed.populated().mapped(true);
    let peer = Peer::start(Role::Ramwire, &bed.destination(), bed.bytes(), mapped, channels)?;
    let address = Address::Tcp { host: "127.0.0.1".into(), port: peer.port };
    let (begun, cpu) = (Instant::now(), own_cpu_seconds());
    let report = send(&address, memory, channels)?;
    let (seconds, cpu) = (begun.elapsed().as_secs_f64(), own_cpu_seconds() - cpu);
    if report.outcome != Outcome::Completed {
        let answer = report.error.map_or_else(|| format!("{:?}", report.outcome), |error| error.to_string());
        return Err(BenchError::Refused { who: "ramwire".into(), what: "to migrate".into(), answer });
    }
    let cpu_seconds = Some(cpu + peer.finish()?.cpu_seconds);
    Ok(Run { seconds, cpu_seconds, downtime_ms: Some(report.statistics.downtime) })
}

fn options(channels: u8) -> DoorOptions {
    let channels = ChannelOptions { count: channels, ..ChannelOptions::default() };
    DoorOptions { channels, ..DoorOptions::default() }
}

fn send(address: &Address, memory: Arc<MappedGuest>, channels: u8) -> Result<SourceReport, BenchError> {
    let stop = Stop::on(&CancelToken::default());
    let door = open_source(address, memory.clone(), &options(channels), &stop)?;
    let source = SourceGuest { memory, dirty: Vec::new(), control: Box::new(Still) };
    let configuration = Configuration { machine: "none".into(), ..Configuration::default() };
    Ok(SourceSession::new(source, door.into(), SourceSettings::new(configuration)).run())
}

/// The receiving side, in the other process.
///
/// # Errors
/// [`BenchError`].
pub fn receive(listener: &mut Listener, mapping: &Mapping, channels: u8) -> Result<(), BenchError> {
    let who = || "ramwire's destination".to_owned();
    let stop = Stop::on(&CancelToken::default());
    let door = listener.accept_door(&options(channels), &stop)?;
    let memory = Box::new(guest(mapping)?);
    let settings = DestinationSettings::default();
    let session = DestinationSession::new(door.source, door.back, memory, Box::new(Still), settings);
    let report = session.run();
    if report.ending == Ending::Running {
        return Ok(());
    }
    let answer = report.error.map_or_else(|| format!("{:?}", report.ending), |error| error.to_string());
    Err(BenchError::Refused { who: who(), what: "to receive".into(), answer })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::bench::Populated;
    use crate::cli::bench::bed::Fill;
    use ramwire::transport::AllowList;

    #[test]
    fn the_destination_ends_up_with_the_same_memory() {
        let base = tempfile::tempdir().unwrap();
        let bed = Bed::make(base.path(), 6 << 20, Fill::Mixed(70), Populated::Yes).unwrap();
        for channels in [0, 3] {
            bed.clear_destination().unwrap();
            let address = "tcp:127.0.0.1:0".parse().unwrap();
            let stop = Stop::on(&CancelToken::default());
            let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
            let address = listener.address().clone();
            let target = bed::map(&bed.destination(), bed.bytes(), true).unwrap();
            let receiver = std::thread::spawn(move || receive(&mut listener, &target, channels));
            let memory = guest(&bed::map(&bed.source(), bed.bytes(), true).unwrap()).unwrap();
            let report = send(&address, memory, channels).unwrap();
            receiver.join().unwrap().unwrap();
            assert_eq!(report.outcome, Outcome::Completed);
            assert_eq!(bed.difference().unwrap(), None, "{channels} channels");
        }
    }
}
