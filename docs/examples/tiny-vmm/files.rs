//! The guest in files: snapshots of it while it runs, and a start from one.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ramwire::guest::GuestControl as _;
use ramwire::session::{
    Configuration, DestinationGuest, RestoreSession, RestoreSettings, RestoreWay, SnapshotBase,
    SnapshotGuest, SnapshotReport, SnapshotSession, SnapshotSettings,
};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, AllowList, ConnectionOptions, Listener, open_source};

use super::vm::{Found, TinyVm};
use super::{Args, Failure, RUNS, receive};

/// A chain of snapshots may have 64 files: then a whole one is taken.
const CHAIN: u32 = 64;

/// Writes the running guest to the file at `path`; it continues. With a base: what has changed since.
fn snapshot(
    vm: &TinyVm,
    path: &Path,
    tracked: bool,
    base: Option<SnapshotBase>,
) -> Result<SnapshotReport, Failure> {
    let configuration = Configuration { machine: "tiny-vmm".into(), ..Configuration::default() };
    let (memory, control) = (vm.memory().clone(), Box::new(vm.clone()));
    // Only the vCPUs write to its memory.
    let guest = SnapshotGuest { memory, control, other_writers: Vec::new() };
    let session = SnapshotSession::new(guest, SnapshotSettings::new(configuration))?;
    let session = match base {
        Some(base) => session.since(base)?,
        // KVM's log, which stays on for the next one.
        None if tracked => session.tracked(vec![vm.dirty_source()?]),
        None => session,
    };
    let options = ConnectionOptions::default();
    let stop = Stop::on(&CancelToken::default());
    // Through the session's memory: what the guest writes meanwhile is not seen there.
    let connection = open_source(&mapped(path)?, session.memory(), &options, &stop)?;
    let mut report = session.spawn(connection)?.wait()?;
    match report.error.take() {
        Some(error) => Err(error.into()),
        None => Ok(report),
    }
}

fn mapped(path: &Path) -> Result<Address, Failure> {
    Ok(format!("mapped:{}", path.display()).parse()?)
}

/// The file of a snapshot: one of a chain needs those before it.
fn file_of(args: &Args, path: &Path, number: u32) -> PathBuf {
    match args.incremental {
        true => format!("{}.{number}", path.display()).into(),
        false => path.to_owned(),
    }
}

/// Takes snapshots of a guest that runs all the time, and makes a VM of each.
pub(super) fn stay(args: &Args, path: &Path) -> Result<(), Failure> {
    let mut vm = TinyVm::filled(args.memory()?, args.log(), args.shape())?;
    vm.resume()?;
    let (began, mut worst) = (Instant::now(), Duration::ZERO);
    let mut base = None;
    for number in 1..=args.migrations {
        let before = vm.pages_written();
        let path = &file_of(args, path, number);
        if number % CHAIN == 1 {
            base = None;
        }
        let mut report = snapshot(&vm, path, args.incremental, base)?;
        base = report.base.take();
        let meanwhile = vm.pages_written() - before;
        let stop = Stop::on(&CancelToken::default());
        let (restored, arrived) =
            receive(args, Listener::bind(&mapped(path)?, AllowList::default(), &stop)?)?;
        drop(restored);
        let (waits, ms) = (report.fault_latency, |time: Duration| time.as_secs_f64() * 1e3);
        println!(
            "{number}: {:.0} MB in {:.0} ms, paused {:.1} ms (state {:.1}, protecting {:.2}), {meanwhile} written meanwhile, {} writes waited (p50 {} us, p99 {} us); {} pages verified, {} wrong; {} written since",
            report.bytes as f64 / 1e6,
            ms(report.total),
            ms(report.pause),
            ms(report.state),
            ms(report.protect),
            report.faults,
            waits.p50_us,
            waits.p99_us,
            arrived.pages,
            arrived.wrong,
            arrived.wrote
        );
        arrived.faults.iter().for_each(|fault| println!("  {fault}"));
        if let Some(error) = arrived.error {
            return Err(error.into());
        }
        if !arrived.running || arrived.wrong > 0 {
            return Err(format!("snapshot {number} does not hold the whole guest").into());
        }
        worst = worst.max(report.pause);
    }
    vm.pause()?;
    let found = vm.verify()?;
    if found.wrong > 0 {
        return Err(format!("the guest itself is not whole any more: {:?}", found.faults).into());
    }
    let took = began.elapsed().as_secs_f64();
    println!(
        "{} snapshots in {took:.1} s, longest pause {:.1} ms, nothing lost",
        args.migrations,
        worst.as_secs_f64() * 1e3
    );
    Ok(())
}

/// Starts a guest from a file. If its memory is read afterwards, a vCPU that touches a missing page waits.
pub(super) fn restore(args: &Args, path: &Path) -> Result<(), Failure> {
    let memory = args.memory()?;
    let mut vm = TinyVm::empty(memory.clone(), args.log())?;
    let mut settings = RestoreSettings::default();
    settings.way = if args.lazy { RestoreWay::Lazy } else { RestoreWay::Eager };
    let guest = DestinationGuest { memory: Box::new(memory), control: Box::new(vm.clone()) };
    let began = Instant::now();
    let restored = RestoreSession::open(guest, &mapped(path)?, settings)?.run()?;
    let started = began.elapsed().as_secs_f64() * 1e3;
    if let Some(error) = restored.report.error {
        return Err(error.into());
    }
    let mut behind = String::new();
    if let Some(pages) = restored.pages {
        let missing = pages.progress().missing;
        pages.wait()?;
        behind = format!(", {missing} pages missing then, {} faults", pages.progress().faults);
    }
    std::thread::sleep(RUNS);
    vm.pause()?;
    let (Found { pages, wrong, faults }, wrote) = (vm.verify()?, vm.pages_written());
    println!(
        "started after {started:.1} ms{behind}; {pages} pages verified, {wrong} wrong; {wrote} written in all"
    );
    faults.iter().for_each(|fault| println!("  {fault}"));
    if wrong > 0 { Err("the guest of the file is not whole".into()) } else { Ok(()) }
}
