//! ramwire's own run over RDMA: two sessions in two processes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use ramwire::engine::Outcome;
use ramwire::error::Chain;
use ramwire::guest::MappedGuest;
use ramwire::session::{SourceGuest, SourceSession, SourceSettings};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::Stop;
use ramwire::transport::rdma::connect_over;
use ramwire::transport::{
    Address, ConnectionOptions, RdmaOptions, SourceConnection, StreamOptions, open_source,
};
use rdma_hooks::tap::Tapped;
use rdma_hooks::verbs::VerbsFabric;

use crate::migrate::bed::{self, Bed};
use crate::migrate::cost::Cost;
use crate::migrate::own::{guest, standing_still};
use crate::migrate::peer::Peer;
use crate::migrate::watch::Watcher;
use crate::{BenchError, migrate::Run};

/// How ramwire goes over RDMA.
#[derive(Clone, Debug)]
pub struct Ours {
    /// An address of the device.
    pub host: String,
    /// Options of the connection.
    pub options: RdmaOptions,
}

impl Ours {
    /// Migrates the bed's memory to another process. With `posted` its requests are counted.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn run(
        &self,
        bed: &Bed,
        watcher: &mut dyn Watcher,
        posted: Option<Arc<AtomicU64>>,
    ) -> Result<Run, BenchError> {
        let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
        let memory = guest(&mapping)?;
        let peer = Peer::start_rdma(bed, &self.host)?;
        let pids = [std::process::id(), peer.id()];
        watcher.begin(pids[0], pids[1])?;
        let before = pids.map(Cost::of_process);
        let begun = Instant::now();
        let connection = self.open(&peer.address, Arc::clone(&memory), posted)?;
        let connecting = begun.elapsed().as_secs_f64();
        let source = SourceGuest { memory, dirty: Vec::new(), control: Box::new(standing_still()) };
        let configuration = Configuration { machine: "none".into(), ..Configuration::default() };
        let mut settings = SourceSettings::new(configuration);
        settings.guest_is_paused = true;
        let report = SourceSession::new(source, connection, settings).run();
        let after = pids.map(Cost::of_process);
        if report.outcome != Outcome::Completed {
            let answer = report
                .error
                .map_or_else(|| format!("{:?}", report.outcome), |error| Chain(&error).to_string());
            return Err(BenchError::Refused { who: "ramwire".into(), what: "to migrate".into(), answer });
        }
        watcher.end()?;
        peer.finish()?;
        let cost = |at: usize| Some(after[at]?.since(before[at]?));
        let statistics = &report.statistics;
        Ok(Run {
            seconds: connecting + statistics.total_time / 1e3,
            setup_seconds: Some(connecting + statistics.setup_time / 1e3),
            source: cost(0),
            destination: cost(1),
            downtime_ms: Some(statistics.downtime),
            ..Run::default()
        })
    }

    fn open(
        &self,
        address: &Address,
        memory: Arc<MappedGuest>,
        posted: Option<Arc<AtomicU64>>,
    ) -> Result<SourceConnection, BenchError> {
        let stop = Stop::never();
        let Some(posted) = posted else {
            let mut options = ConnectionOptions::default();
            options.rdma = self.options.clone();
            return Ok(open_source(address, memory, &options, &stop)?);
        };
        let Some((host, port)) = address.host_and_port() else {
            let address = address.to_string();
            return Err(BenchError::Refused {
                who: "the other process".into(),
                what: "RDMA".into(),
                answer: address,
            });
        };
        let verbs = VerbsFabric::open().map_err(|error| BenchError::NoRdma(Box::new(error)))?;
        let counting = Tapped::new(verbs, move |posting| {
            posted.fetch_add(posting.requests() as u64, Ordering::Relaxed);
        });
        let (counting, stream) = (Arc::new(counting), StreamOptions::default());
        Ok(connect_over(counting, host, port, memory, &stream, &self.options, &stop)?)
    }
}
