//! One VMM: its memory is served until it has ended.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use ramwire::error::Chain;
use ramwire::session::{PageFailure, ServeSettings, ServedMemory, Spawner};
use ramwire::sys::{Stop, StopReason};
use ramwire::transport::StoredMemory;
use rustix::net::{RecvFlags, recv};

use super::super::common::human_bytes;
use super::super::output::note;
use super::figures::Figures;
use super::handoff::{HandOff, Handed};
use super::listen::Stranger;

/// Time in which a connected VMM must send its hand-off.
const HAND_OFF_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval between two checks of the progress; pages that could not be read are retried.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// What one thread serves.
pub(super) struct Vmm {
    pub(super) stranger: Stranger,
    pub(super) memory: Arc<StoredMemory>,
    pub(super) spawner: Spawner,
    pub(super) figures: Arc<Figures>,
    pub(super) stop: Stop,
}

impl Vmm {
    /// Serves it to its end.
    pub(super) fn serve(self, protocol: &dyn HandOff) {
        let name = &self.stranger.name;
        match self.take(protocol) {
            Err(why) => {
                self.figures.refused();
                note!("ramwire pager: {name} was refused: {why}");
            }
            Ok((served, bytes)) => {
                note!("ramwire pager: {name}: {} of memory are served", human_bytes(bytes));
                let number = self.figures.begun();
                self.watch(&served, number);
                // A guest may have ended before the thread that placed its last page has counted it.
                let progress = served.end();
                self.figures.ended(number, &progress);
                let latency = progress.latency;
                note!(
                    "ramwire pager: {name} has ended: {} faults, {} pages read for them, {} were still missing; from fault \
                     to page {} us (p50), {} us (p99)",
                    progress.faults,
                    progress.urgent,
                    progress.missing,
                    latency.p50_us,
                    latency.p99_us
                );
            }
        }
    }

    fn take(&self, protocol: &dyn HandOff) -> Result<(ServedMemory, u64), String> {
        let stop = self.stop.within(HAND_OFF_TIMEOUT);
        let Handed { regions, faults } =
            protocol.receive(&self.stranger.connection, &stop).map_err(|error| Chain(&error).to_string())?;
        let mut settings = ServeSettings::default();
        settings.spawner = self.spawner.clone();
        let served = ServedMemory::serve(faults, &regions, &self.memory, &settings);
        let bytes = regions.iter().map(|region| region.len).sum();
        served.map(|served| (served, bytes)).map_err(|error| Chain(&error).to_string())
    }

    /// Runs until the VMM has ended, or this command must end.
    fn watch(&self, served: &ServedMemory, number: u64) {
        let name = &self.stranger.name;
        let (mut told, mut is_connected, mut is_whole) = (None::<PageFailure>, true, false);
        loop {
            let watched: &[BorrowedFd<'_>] = match (is_connected, &self.stranger.process) {
                (true, _) => &[self.stranger.connection.as_fd()],
                // It has closed the connection but still runs: its guest needs its memory.
                (false, Some(process)) => &[process.as_fd()],
                (false, None) => return,
            };
            match self.stop.within(CHECK_INTERVAL).wait_any(watched) {
                Ok(Some(StopReason::Cancelled)) | Err(_) => return,
                Ok(Some(StopReason::Deadline)) => {}
                Ok(None) if !is_connected => return,
                Ok(None) => is_connected = !self.has_hung_up(),
            }
            if served.is_over() {
                return;
            }
            let progress = served.progress();
            let missing = progress.missing;
            self.figures.is_at(number, progress);
            if !is_whole && missing == 0 {
                is_whole = true;
                note!("ramwire pager: {name}: all of its memory is there");
            }
            if let Some(failure) = served.failure() {
                if told.as_ref() != Some(&failure) {
                    note!(
                        "ramwire pager: {name}: {failure}; it is tried again every {} s",
                        CHECK_INTERVAL.as_secs()
                    );
                }
                told = Some(failure);
                served.retry();
            }
        }
    }

    /// Any message other than its hand-off is ignored.
    fn has_hung_up(&self) -> bool {
        match recv(&self.stranger.connection, &mut [0u8; 4096][..], RecvFlags::DONTWAIT) {
            Ok((0, _)) => true,
            Ok(_) => false,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
            Err(_) => true,
        }
    }
}
