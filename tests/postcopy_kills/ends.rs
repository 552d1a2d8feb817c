//! The two ends, each a process of its own.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ramwire::engine::{Ending, Outcome, PostcopyRule};
use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::guest::{GuestControl, MappedGuest};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    DestinationGuest, DestinationSession, DestinationSettings, PostcopySettings, Redial, SourceConnection,
    SourceGuest, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{Mapping, Stop};
use ramwire::transport::{
    Address, AllowList, DestinationConnection, Listener, OpenError, StreamChannel, StreamOptions, connect,
};
use ramwire::units::{PageSize, Percent, Rate};

use crate::common::Deadline;
use crate::faults::{Faults, Watched};
use crate::log::{Log, Recorded};
use crate::plan::{PAGES, Plan, WORKING_SET};

/// Interval between two checks whether the source is alive.
const LOOK: Duration = Duration::from_millis(20);

/// The environment of a process: the seed, the folder of its run, and which end it is.
pub(crate) const TOLD: [&str; 3] = ["RAMWIRE_KILL_SEED_OF_END", "RAMWIRE_KILL_DIR", "RAMWIRE_KILL_END"];

#[test]
#[ignore = "is one end of a migration, started by the other tests"]
fn an_end() {
    let Ok(seed) = std::env::var(TOLD[0]) else { return };
    let (plan, dir) = (Plan::of(seed.parse().unwrap()), std::env::var_os(TOLD[1]).unwrap());
    match &*std::env::var(TOLD[2]).unwrap() {
        "source" => source(&plan, dir.as_ref()),
        _ => destination(&plan, dir.as_ref()),
    }
    std::process::exit(0);
}

fn memory() -> Arc<MappedGuest> {
    let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
    for (index, pages) in PAGES.iter().enumerate() {
        let mapping = Mapping::anonymous(pages * 4096).unwrap();
        let block = RamBlock::new(BlockName::new(&format!("b{index}")).unwrap(), pages * 4096);
        builder = builder.mapping(block, &mapping);
    }
    Arc::new(builder.build().unwrap())
}

/// Wrong pages of a guest, which is paused for it.
fn wrong(guest: &SyntheticGuest) -> u64 {
    guest.clone().pause().unwrap();
    guest.verify().unwrap().wrong
}

fn source(plan: &Plan, dir: &Path) {
    fs::write(dir.join("source.pid"), std::process::id().to_string()).unwrap();
    let log = Log::of(dir);
    let config = SyntheticConfig {
        seed: plan.seed,
        zero: Percent::new(20).unwrap(),
        working_set: WORKING_SET * 4096,
        rate: Some(Rate(plan.writes)),
        writers: 2,
        changes: 4096,
    };
    let guest = SyntheticGuest::filled(memory(), config).unwrap();
    let mut control = Recorded { guest: guest.clone(), end: "source", log: Log::of(dir) };
    control.resume().unwrap();
    let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(plan.rounds));
    postcopy.reconnect_timeout = Plan::RECONNECT;
    postcopy.preempt = plan.preempt;
    postcopy.release_ram = plan.release;
    postcopy.max_bandwidth = plan.bandwidth.map(Rate);
    let mut settings =
        SourceSettings::new(Configuration { machine: "none".into(), ..Configuration::default() });
    settings.postcopy = Some(postcopy);
    // So that it always reaches the switch.
    settings.downtime_limit = Duration::ZERO;
    let address: Address = fs::read_to_string(dir.join("address")).unwrap().parse().unwrap();
    let options = StreamOptions::default();
    let connection = SourceConnection::over(
        connect(&address, &options, &Stop::never()).unwrap(),
        Arc::clone(guest.memory()) as Arc<_>,
    );
    let of = SourceGuest {
        memory: Arc::clone(guest.memory()) as Arc<_>,
        dirty: vec![guest.software()],
        control: Box::new(control),
    };
    let report = SourceSession::new(of, connection, settings)
        .with_reconnect(Box::new(Redial::new(address, options)))
        .run();
    // A guest that is paused there is unchanged since its pause.
    let runs = matches!(report.outcome, Outcome::StaysHere(_));
    let wrong = wrong(&guest);
    let outcome = if runs { "StaysHere".into() } else { format!("{:?}", report.outcome) };
    let released = report.released_pages;
    log.line(&format!("source ended {outcome} wrong={wrong} released={released} error={:?}", report.error));
}

fn destination(plan: &Plan, dir: &Path) {
    let (log, faults) = (Log::of(dir), Faults::new(plan, dir));
    let guest = SyntheticGuest::empty(memory()).reading();
    let any: Address = "tcp:127.0.0.1:0".parse().unwrap();
    let mut listener = Listener::bind(&any, AllowList::default(), &Stop::never()).unwrap();
    fs::write(dir.join("address.new"), listener.address().to_string()).unwrap();
    fs::rename(dir.join("address.new"), dir.join("address")).unwrap();
    let (gone, accepts) = (dir.join("source-is-gone"), faults.clone());
    let mut first = true;
    let mut accept = move |stop: &Stop| -> Result<StreamChannel, OpenError> {
        loop {
            match listener.accept(&StreamOptions::default(), &stop.within(LOOK)) {
                Ok(channel) => {
                    accepts.accepted(channel.breaker(), std::mem::take(&mut first));
                    return Ok(channel);
                }
                Err(error) if stop.reason().is_some() || gone.exists() => return Err(error),
                Err(_) => {}
            }
        }
    };
    let connection = DestinationConnection::over(accept(&Stop::never()).unwrap());
    let mut settings = DestinationSettings::default();
    settings.postcopy = true;
    let memory = Arc::new(Watched { memory: Arc::clone(guest.memory()), faults: faults.clone() });
    let control = Recorded { guest: guest.clone(), end: "destination", log: Log::of(dir) };
    let arriving = DestinationGuest { memory: Box::new(memory), control: Box::new(control) };
    let session =
        DestinationSession::new(arriving, connection, settings).with_next_connection(Box::new(accept));
    faults.follow(session.statistics());
    let report = session.run();
    let mut checked = String::new();
    if report.ending == Ending::Running {
        let looks = Deadline::seconds(100);
        looks.poll("its threads read all pages", String::new, || guest.is_read().then_some(()));
        checked = format!("wrong={} read={}", wrong(&guest), guest.pages_read());
    }
    log.line(&format!("destination ended {:?} {checked} error={:?}", report.ending, report.error));
    // Its threads may wait for pages that never come, and end with the process.
    std::mem::forget(guest);
}
