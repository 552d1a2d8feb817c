//! ramwire's own run: two sessions in two processes, as an embedder or the command would hold them.
//!
//! Nobody writes the memory and no dirty log runs, as with the stopped QEMUs it is compared with.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::{GuestControl, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    DestinationSession, DestinationSettings, SourceConnection, SourceGuest, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Mapping, Stop};
use ramwire::transport::{Address, InlineLink, StreamChannel, StreamOptions, connect};
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

/// Migrates the bed's memory to another process.
///
/// # Errors
/// [`BenchError`].
pub fn run(bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = guest(&mapping)?;
    let peer = Peer::start(Role::Ramwire, &bed.destination(), bed.bytes(), bed.populated().mapped(true))?;
    let address = Address::Tcp { host: "127.0.0.1".into(), port: peer.port };
    let stop = Stop::on(&CancelToken::default());
    let (begun, cpu) = (Instant::now(), own_cpu_seconds());
    let (sink, back) = connect(&address, &StreamOptions::default(), &stop)?.with_return_path();
    let connection = SourceConnection {
        link: Box::new(InlineLink::new(Box::new(sink), memory.clone())),
        back: back.map(|back| Box::new(back) as Box<_>),
    };
    let source = SourceGuest { memory, dirty: Vec::new(), control: Box::new(Still) };
    let configuration = Configuration { machine: "none".into(), ..Configuration::default() };
    let report = SourceSession::new(source, connection, SourceSettings::new(configuration)).run();
    let (seconds, cpu) = (begun.elapsed().as_secs_f64(), own_cpu_seconds() - cpu);
    if report.outcome != Outcome::Completed {
        let answer = report.error.map_or_else(|| format!("{:?}", report.outcome), |error| error.to_string());
        return Err(BenchError::Refused { who: "ramwire".into(), what: "to migrate".into(), answer });
    }
    let cpu_seconds = Some(cpu + peer.finish()?.cpu_seconds);
    Ok(Run { seconds, cpu_seconds, downtime_ms: Some(report.statistics.downtime) })
}

/// The receiving side, in the other process.
///
/// # Errors
/// [`BenchError`].
pub fn receive(socket: TcpStream, mapping: &Mapping) -> Result<(), BenchError> {
    let who = || "ramwire's destination".to_owned();
    let channel = StreamChannel::from_fd(socket.into(), "the source", &StreamOptions::default());
    let failed = |source| BenchError::Io { who: who(), doing: "taking the connection", source };
    let (source, back) = channel.map_err(failed)?.with_return_path();
    let session = DestinationSession::new(
        Box::new(source),
        back.map(|back| Box::new(back) as Box<_>),
        Box::new(guest(mapping)?),
        Box::new(Still),
        DestinationSettings::default(),
    );
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
    use std::net::TcpListener;

    #[test]
    fn the_destination_ends_up_with_the_same_memory() {
        let base = tempfile::tempdir().unwrap();
        let bed = Bed::make(base.path(), 6 << 20, Fill::Mixed(70), Populated::Yes).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (far, _) = listener.accept().unwrap();
        let target = bed::map(&bed.destination(), bed.bytes(), true).unwrap();
        let receiver = std::thread::spawn(move || receive(far, &target));
        let memory = guest(&bed::map(&bed.source(), bed.bytes(), true).unwrap()).unwrap();
        let options = StreamOptions::default();
        let (sink, back) = StreamChannel::from_fd(near.into(), "far", &options).unwrap().with_return_path();
        let link = Box::new(InlineLink::new(Box::new(sink), memory.clone()));
        let connection = SourceConnection { link, back: back.map(|back| Box::new(back) as Box<_>) };
        let source = SourceGuest { memory, dirty: Vec::new(), control: Box::new(Still) };
        let settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
        let report = SourceSession::new(source, connection, settings).run();
        receiver.join().unwrap().unwrap();
        assert_eq!(report.outcome, Outcome::Completed);
        assert_eq!(bed.difference().unwrap(), None);
    }
}
