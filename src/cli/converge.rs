//! Options that make a migration converge although the guest writes fast.

use std::time::Duration;

use ramwire::engine::{OnTimeout, ThrottlePolicy};
use ramwire::observe::{EventKind, SharedStatistics};
use ramwire::session::{Error, SourceSettings};
use ramwire::units::{Percent, Rate};

use super::common::{Usage, bytes, seconds};
use super::output::note;

/// What a source does about a guest that writes faster than its pages leave; QEMU's names and defaults.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ConvergeArgs {
    /// Throttle all vCPUs, step by step, while the guest writes too much
    #[arg(long, conflicts_with = "dirty_limit")]
    auto_converge: bool,
    /// Throttle once the guest writes more than this percentage of the bytes that are sent
    #[arg(long, value_name = "PERCENT", default_value = "50", value_parser = share)]
    throttle_trigger_threshold: Percent,
    /// With --auto-converge: the first step, in percent of the vCPUs' time
    #[arg(long, value_name = "PERCENT", default_value = "20", value_parser = throttle_percent)]
    #[arg(requires = "auto_converge", conflicts_with = "dirty_limit")]
    cpu_throttle_initial: Percent,
    /// With --auto-converge: each further step
    #[arg(long, value_name = "PERCENT", default_value = "10", value_parser = throttle_percent)]
    #[arg(requires = "auto_converge", conflicts_with = "dirty_limit")]
    cpu_throttle_increment: Percent,
    /// With --auto-converge: smaller steps when only a little more throttling is needed
    #[arg(long, requires = "auto_converge", conflicts_with = "dirty_limit")]
    cpu_throttle_tailslow: bool,
    /// With --auto-converge: maximum share of the vCPUs' time that is taken
    #[arg(long, value_name = "PERCENT", default_value = "99", value_parser = throttle_percent)]
    #[arg(requires = "auto_converge", conflicts_with = "dirty_limit")]
    max_cpu_throttle: Percent,
    /// Keep what each vCPU writes near --vcpu-dirty-limit while the guest writes too much
    #[arg(long)]
    dirty_limit: bool,
    /// With --dirty-limit: bytes a second that a vCPU may write
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = bytes, requires = "dirty_limit")]
    vcpu_dirty_limit: u64,
    /// Bytes a second that the link will carry while the guest is paused, for the estimate of the downtime; 0: as
    /// measured
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    avail_switchover_bandwidth: u64,
    #[command(flatten)]
    pub(super) timeout: TimeoutArgs,
}

/// How long a migration may take, and what becomes of it then.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct TimeoutArgs {
    /// Time by which the guest must have been paused
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    timeout: Option<Duration>,
    /// What happens after that time: cancel keeps the guest here, finish pauses it however long it is paused then,
    /// postcopy starts it at the destination before its memory has arrived
    #[arg(long, value_name = "WHAT", default_value = "cancel", requires = "timeout")]
    timeout_action: TimeoutAction,
}

impl TimeoutArgs {
    /// The guest may run at the destination before its memory has arrived.
    pub(super) fn may_switch(&self) -> bool {
        self.timeout.is_some() && matches!(self.timeout_action, TimeoutAction::Postcopy)
    }

    pub(super) fn apply(&self, settings: &mut SourceSettings) {
        let action = match self.timeout_action {
            TimeoutAction::Cancel => OnTimeout::Cancel,
            TimeoutAction::Finish => OnTimeout::Finish,
            TimeoutAction::Postcopy => OnTimeout::Postcopy,
        };
        settings.timeout = self.timeout.map(|time| (time, action));
    }
}

/// What helps a live guest that does not converge.
pub(super) const REMEDIES: &str = "raise --max-bandwidth or --downtime-ms, send differences (--xbzrle-cache-size), slow the \
                                   guest down (--auto-converge or --dirty-limit), or end it by --timeout and \
                                   --timeout-action finish";

/// Reports, during the migration, that it does not converge, with a remedy.
pub(super) fn warn_if_not_converging(
    command: &'static str,
    statistics: &SharedStatistics,
    remedies: &'static str,
) {
    statistics.listen(move |event| {
        if let EventKind::NotConverging(figures) = &event.kind {
            note!("ramwire {command}: the migration does not converge: {figures}; {remedies}");
        }
    });
}

/// Reports the options for the remedies of a migration that did not converge.
pub(super) fn print_remedies(command: &str, error: Option<&Error>, remedies: &str) {
    if let Some(Error::NotConverged { .. }) = error {
        note!("ramwire {command}: {remedies}");
    }
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum TimeoutAction {
    /// The migration ends and the guest stays
    Cancel,
    /// The guest is paused and moves
    Finish,
    /// The guest runs at the destination before its memory has come
    Postcopy,
}

fn share(text: &str) -> Result<Percent, String> {
    within(text, 1, 100)
}

fn throttle_percent(text: &str) -> Result<Percent, String> {
    within(text, 1, 99)
}

fn within(text: &str, least: u8, most: u8) -> Result<Percent, String> {
    let number = text.parse().ok().filter(|number| (least..=most).contains(number)).and_then(Percent::new);
    number.ok_or_else(|| format!("{text:?} is not a number from {least} to {most}"))
}

impl ConvergeArgs {
    /// True if nothing is configured: neither throttling nor a time limit.
    pub(super) fn is_empty(&self) -> bool {
        !self.auto_converge && !self.dirty_limit && self.timeout.timeout.is_none()
    }

    /// Sets the configured values in `settings`.
    pub(super) fn apply(&self, settings: &mut SourceSettings) -> Result<(), Usage> {
        if self.auto_converge {
            if self.max_cpu_throttle < self.cpu_throttle_initial {
                return Err(Usage("--max-cpu-throttle is less than --cpu-throttle-initial".into()));
            }
            settings.throttling = Some(ThrottlePolicy::AutoConverge {
                initial: self.cpu_throttle_initial,
                increment: self.cpu_throttle_increment,
                tailslow: self.cpu_throttle_tailslow,
                max: self.max_cpu_throttle,
            });
        }
        if self.dirty_limit {
            settings.throttling = Some(ThrottlePolicy::DirtyLimit { quota: Rate(self.vcpu_dirty_limit) });
        }
        settings.throttle_trigger_threshold = self.throttle_trigger_threshold;
        let assumed = self.avail_switchover_bandwidth;
        settings.switchover_bandwidth = (assumed > 0).then_some(Rate(assumed));
        self.timeout.apply(settings);
        Ok(())
    }
}
