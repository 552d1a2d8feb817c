//! `ramwire demo --restore FILE`: starts a guest from a file; the guest checks itself. With `--lazy` it reads all of
//! its memory while the pages arrive.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramwire::engine::Ending;
use ramwire::session::{DestinationGuest, RestoreSession, RestoreSettings, RestoreWay, Zeroed};
use ramwire::transport::Address;

use super::blocks::BlockSpec;
use super::guest::GuestKind;
use super::{Args, Failure};
use crate::cli::args::Exit;
use crate::cli::output::result_text;
use crate::cli::remedies::in_words;

/// How long the guest runs before it checks itself.
const RUN: Duration = Duration::from_millis(200);

pub(super) fn run(args: &Args, path: &Path) -> Result<Exit, Failure> {
    let blocks = BlockSpec::list(args.ram, args.hugepages, &args.block).map_err(super::Usage)?;
    super::checks::check_room(args, &blocks)?;
    let memory = Arc::new(BlockSpec::memory(&blocks, args.huge_pages)?);
    let guest = args.guest.empty(Arc::clone(&memory), args.lazy)?;
    let address: Address = format!("mapped:{}", path.display()).parse()?;
    let mut settings = RestoreSettings::default();
    settings.way = if args.lazy { RestoreWay::Lazy } else { RestoreWay::Eager };
    // Its threads read and write in user mode, which needs no privilege.
    settings.user_mode_only = args.guest == GuestKind::Synthetic;
    let arriving = DestinationGuest { memory: Box::new(Zeroed(memory)), control: guest.control() };
    let began = Instant::now();
    let restored = RestoreSession::open(arriving, &address, settings)?.run()?;
    let started = began.elapsed();
    match restored.report.error {
        _ if restored.report.ending == Ending::Running => {}
        Some(error) => {
            // Most likely the guest of the file has other memory than this one.
            let hint = "give --ram and --block as they were when the file was written";
            return Err(format!("{}: {}; {hint}", path.display(), in_words(&error)).into());
        }
        None => return Err("the guest of the file did not run".into()),
    }
    let mut behind = String::new();
    if let Some(pages) = restored.pages {
        pages.wait()?;
        let (progress, took) = (pages.progress(), began.elapsed());
        behind = format!(
            "behind      its memory came within {:.1} ms; {} faults, p50 {} us, p99 {} us, longest {} us\n",
            took.as_secs_f64() * 1e3,
            progress.faults,
            progress.latency.p50_us,
            progress.latency.p99_us,
            progress.latency.max_us
        );
    }
    std::thread::sleep(RUN);
    guest.control().pause()?;
    let found = guest.verify()?;
    result_text!(
        "restored    from {}; the guest ran after {:.1} ms\n{behind}{}    it checked {} pages: {} wrong\n",
        path.display(),
        started.as_secs_f64() * 1e3,
        if found.wrong == 0 { "verified" } else { "WRONG   " },
        found.pages,
        found.wrong
    );
    for fault in &found.faults {
        result_text!("            {fault}\n");
    }
    Ok(if found.wrong == 0 { Exit::Done } else { Exit::NotVerified })
}
