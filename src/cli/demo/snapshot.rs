//! `ramwire demo --snapshot FILE`: the guest stays, and is written to a file while it runs; another guest is made of that
//! file, runs, and checks itself.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ramwire::engine::Ending;
use ramwire::guest::MappedGuest;
use ramwire::session::{
    Configuration, DestinationGuest, DestinationSession, DestinationSettings, SnapshotBase, SnapshotGuest,
    SnapshotOutcome, SnapshotReport, SnapshotSession, SnapshotSettings, Zeroed,
};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, AllowList, ConnectionOptions, Listener, open_source};

use super::blocks::BlockSpec;
use super::guest::{DemoGuest, Found, GuestKind};
use super::{Args, Failure};
use crate::cli::args::Exit;
use crate::cli::common::{complain, human_bytes};
use crate::cli::output::{note, result_text};
use crate::cli::signals::{SignalWatch, cancel_on_signal};

/// How long the guest of the file runs before it checks itself.
const RUN: Duration = Duration::from_millis(200);

/// A guest that snapshots are taken of.
struct Taken<'a> {
    args: &'a Args,
    memory: Arc<MappedGuest>,
    guest: Box<dyn DemoGuest>,
    cancel: CancelToken,
    signals: SignalWatch,
}

pub(super) fn run(args: &Args, path: &Path) -> Result<Exit, Failure> {
    let blocks = BlockSpec::list(args.ram, args.hugepages, &args.block).map_err(super::Usage)?;
    super::checks::check_room(args, &blocks)?;
    let memory = Arc::new(BlockSpec::memory(&blocks, args.huge_pages)?);
    let (guest, _) = args.guest.filled(args, Arc::clone(&memory))?;
    let cancel = CancelToken::default();
    let signals = cancel_on_signal(vec![cancel.clone()]);
    let mut taken = Taken { args, memory, guest, cancel, signals };
    let mut base = None;
    if let Some(path) = &args.base {
        let (report, wrote) = taken.take(path, Against::Nothing { tracked: true })?;
        if let Some(exit) = refused(path, &report) {
            return Ok(exit);
        }
        tell(path, &report, wrote);
        std::thread::sleep(RUN);
        base = report.base;
    }
    let against = base.map_or(Against::Nothing { tracked: false }, |base| Against::Base(Box::new(base)));
    let (report, wrote) = taken.take(path, against)?;
    if let Some(exit) = refused(path, &report) {
        return Ok(exit);
    }
    let found = restored(args, &blocks, &mapped(path)?, &Stop::on(&taken.cancel))?;
    let exit = if found.wrong == 0 { Exit::Done } else { Exit::NotVerified };
    taken.signals.ended(exit);
    tell(path, &report, wrote);
    tell_found(&found);
    Ok(exit)
}

/// What a snapshot holds only the changes since.
enum Against {
    Nothing { tracked: bool },
    Base(Box<SnapshotBase>),
}

fn mapped(path: &Path) -> Result<Address, Failure> {
    Ok(format!("mapped:{}", path.display()).parse()?)
}

impl Taken<'_> {
    /// One snapshot, and how many pages the guest wrote meanwhile.
    fn take(&mut self, path: &Path, against: Against) -> Result<(SnapshotReport, u64), Failure> {
        let machine = Configuration { machine: "ramwire-demo".into(), ..Configuration::default() };
        let mut settings = SnapshotSettings::new(machine);
        // Its threads write in user mode, which needs no privilege.
        settings.user_mode_only = self.args.guest == GuestKind::Synthetic;
        let (memory, control) = (Arc::clone(&self.memory), self.guest.control());
        let given = SnapshotGuest { memory, control, other_writers: Vec::new() };
        let session = SnapshotSession::new(given, settings)?.with_cancel(self.cancel.clone());
        let (session, runs) = match against {
            Against::Nothing { tracked: true } => (session.tracked(vec![self.guest.written()?]), false),
            Against::Nothing { tracked: false } => (session, false),
            Against::Base(base) => (session.since(*base)?, true),
        };
        self.signals.ask(session.canceller());
        let stop = Stop::on(&self.cancel);
        let options = ConnectionOptions::default();
        let connection = open_source(&mapped(path)?, session.memory(), &options, &stop)?;
        if !runs {
            self.guest.control().resume()?;
        }
        let written = || self.guest.control().vcpu_dirty_pages().iter().sum::<u64>();
        let before = written();
        let report = session.run(connection);
        let wrote = written().saturating_sub(before);
        Ok((report, wrote))
    }
}

/// How the command ends without a snapshot.
fn refused(path: &Path, report: &SnapshotReport) -> Option<Exit> {
    if let Some(error) = &report.error {
        complain("demo", error);
        if report.not_resumed {
            note!("the guest is whole and stays paused");
        } else {
            note!("the guest runs on, and {} holds no snapshot", path.display());
        }
    }
    match report.outcome {
        SnapshotOutcome::Taken => None,
        SnapshotOutcome::Failed => Some(Exit::Failed),
        SnapshotOutcome::Cancelled => Some(Exit::Cancelled),
    }
}

/// A guest made of the file, that has run.
fn restored(args: &Args, blocks: &[BlockSpec], address: &Address, stop: &Stop) -> Result<Found, Failure> {
    let memory = Arc::new(BlockSpec::memory(blocks, args.huge_pages)?);
    let guest = args.guest.empty(Arc::clone(&memory), false)?;
    let mut listener = Listener::bind(address, AllowList::default(), stop)?;
    let connection = listener.accept_connection(&ConnectionOptions::default(), stop)?;
    let arriving = DestinationGuest { memory: Box::new(Zeroed(memory)), control: guest.control() };
    let report = DestinationSession::new(arriving, connection, DestinationSettings::default()).run();
    match report.error {
        _ if report.ending == Ending::Running => {}
        Some(error) => return Err(error.into()),
        None => return Err("the guest of the file did not run".into()),
    }
    std::thread::sleep(RUN);
    guest.control().pause()?;
    Ok(guest.verify()?)
}

fn tell(path: &Path, report: &SnapshotReport, wrote: u64) {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let waits = report.fault_latency;
    result_text!(
        "snapshot    {} in {}: {} pages with content, {} zero\n\
         took        {:.1} ms; the guest was paused for {:.2} ms (device state {:.2}, protecting its memory {:.2})\n\
         before      most of its memory was protected within {:.1} ms, while it ran; {} writes met that\n\
         meanwhile   the guest wrote {wrote} pages; {} writes waited for a copy, p50 {} us, p99 {} us, longest {} us\n",
        human_bytes(report.bytes),
        path.display(),
        report.pages.normal,
        report.pages.zero,
        ms(report.total),
        ms(report.pause),
        ms(report.state),
        ms(report.protect),
        ms(report.ahead),
        report.early_faults,
        report.faults,
        waits.p50_us,
        waits.p99_us,
        waits.max_us,
    );
}

fn tell_found(found: &Found) {
    result_text!(
        "{}    a guest made of the file ran, and checked {} pages: {} wrong\n",
        if found.wrong == 0 { "verified" } else { "WRONG   " },
        found.pages,
        found.wrong,
    );
    for fault in &found.faults {
        result_text!("            {fault}\n");
    }
}
