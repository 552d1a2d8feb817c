//! Options of a switch to postcopy.

use std::time::Duration;

use ramwire::engine::{OnTimeout, PostcopyRule};
use ramwire::observe::{EventKind, SharedStatistics};
use ramwire::session::{PostcopySettings, SourceSettings};
use ramwire::transport::Address;
use ramwire::units::Rate;

use super::common::{Usage, bytes, seconds};
use super::output::note;
use super::qmp::Plan;

/// Whether the guest may run at the destination before its memory has come.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct PostcopyArgs {
    /// Start the guest at the destination before its memory has arrived; pages that it waits for are sent first (QEMU:
    /// capability postcopy-ram, also at the destination)
    #[arg(long)]
    pub(super) postcopy: bool,
    /// With --postcopy: switch only after this many rounds (3) or this time (20s), or at the command of a client of
    /// --qmp (command), unless the rest fits the downtime before that
    #[arg(long, value_name = "ROUNDS|SECONDSs|command", requires = "postcopy", value_parser = rule)]
    postcopy_after: Option<PostcopyRule>,
    /// With --postcopy: maximum bytes a second of pages that no thread waits for; 0 is no limit
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = bytes)]
    max_postcopy_bandwidth: u64,
}

/// Further connections of a migration.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ReconnectArgs {
    /// When the connection is lost, connect again for so long, and send only what has not arrived; the guest runs on
    /// meanwhile. To a ramwire with --reconnect; with --postcopy behind the switch only (QEMU: migrate-recover there). The
    /// other connection has no page channels. 0: the loss is the end
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    reconnect: Duration,
    /// With --reconnect: another address of the same destination, tried in turn with the first; repeat for more. After an
    /// rdma: connection the migration goes on at a tcp: one; an auto: address has one of its own
    #[arg(long, value_name = "URI", requires = "reconnect")]
    pub(super) fallback: Vec<Address>,
    /// With --postcopy: send pages that are waited for on a connection of their own (QEMU: capability postcopy-preempt, also
    /// at the destination). Not with --reconnect: a newer QEMU ends on a connection that comes before it has seen the loss
    #[arg(long, requires = "postcopy", conflicts_with = "reconnect")]
    postcopy_preempt: bool,
    /// With --postcopy: have the kernel take back the memory of pages that the destination has, as they come there (QEMU:
    /// capability release-ram). The files keep them, and a lost connection can be replaced all the same
    #[arg(long, requires = "postcopy")]
    release_ram: bool,
}

/// Reports once that `--reconnect` has no effect, as soon as both ends have said what they can.
pub(super) fn warn_if_not_replaceable(command: &'static str, statistics: &SharedStatistics) {
    statistics.listen(move |event| {
        if let EventKind::NotReplaceable { why } = &event.kind {
            note!(
                "ramwire {command}: --reconnect has no effect here, the loss of the connection ends the migration: {why} \
                 (it needs a `ramwire receive --reconnect` at tcp:, unix: or auto:, or one with --fallback at both ends)"
            );
        }
    });
}

fn rule(text: &str) -> Result<PostcopyRule, String> {
    if text == "command" {
        return Ok(PostcopyRule::OnCommand);
    }
    match text.strip_suffix('s') {
        Some(time) => seconds(time).map(PostcopyRule::AfterTime),
        None => text
            .parse()
            .map(PostcopyRule::AfterRounds)
            .map_err(|_| format!("{text:?} is neither a number of rounds (3), a time (20s) nor \"command\"")),
    }
}

impl PostcopyArgs {
    /// Refuses what has no effect. `controlled`: a client of the monitor may command the switch, and ask for postcopy;
    /// `on_timeout`: the switch comes when the time is over.
    pub(super) fn check(&self, controlled: bool, on_timeout: bool) -> Result<(), Usage> {
        let why = match () {
            () if !controlled && matches!(self.postcopy_after, Some(PostcopyRule::OnCommand)) => {
                "--postcopy-after command waits for a client of the monitor: give --qmp with send, or the number of \
                 rounds or the time after which the switch comes"
            }
            () if self.max_postcopy_bandwidth > 0 && !(self.postcopy || on_timeout || controlled) => {
                "--max-postcopy-bandwidth is of a switch to postcopy: give --postcopy too"
            }
            () => return Ok(()),
        };
        Err(Usage(why.into()))
    }

    /// Under QEMU's names.
    pub(super) fn plan(&self, plan: Plan) -> Plan {
        plan.having("postcopy-ram", self.postcopy).with("max-postcopy-bandwidth", self.max_postcopy_bandwidth)
    }

    /// As a client of the monitor has planned it: a client that switches the capability on also commands the switch.
    pub(super) fn follow(&mut self, plan: &Plan) {
        if plan.has("postcopy-ram") != self.postcopy {
            self.postcopy = plan.has("postcopy-ram");
            self.postcopy_after = self.postcopy.then_some(PostcopyRule::OnCommand);
        }
        self.max_postcopy_bandwidth = plan.number("max-postcopy-bandwidth");
    }

    /// Completes `settings`, whose timeout is set; one that switches announces it by itself.
    pub(super) fn apply(&self, settings: &mut SourceSettings) {
        let on_timeout = matches!(settings.timeout, Some((_, OnTimeout::Postcopy)));
        let rule = match self.postcopy_after {
            Some(rule) => rule,
            None if self.postcopy => PostcopyRule::AfterRounds(0),
            None if on_timeout => PostcopyRule::OnCommand,
            None => return,
        };
        let mut postcopy = PostcopySettings::new(rule);
        postcopy.max_bandwidth = Rate::limit(self.max_postcopy_bandwidth);
        settings.postcopy = Some(postcopy);
    }
}

impl ReconnectArgs {
    /// Under QEMU's names.
    pub(super) fn plan(&self, plan: Plan) -> Plan {
        plan.having("postcopy-preempt", self.postcopy_preempt)
    }

    /// As a client of the monitor has planned it.
    pub(super) fn follow(&mut self, plan: &Plan) {
        self.postcopy_preempt = plan.has("postcopy-preempt");
    }

    /// Completes `settings`, whose postcopy is set.
    pub(super) fn apply(&self, settings: &mut SourceSettings) {
        settings.reconnect_timeout = self.reconnect;
        if let Some(postcopy) = &mut settings.postcopy {
            postcopy.reconnect_timeout = self.reconnect;
            postcopy.preempt = self.postcopy_preempt;
            postcopy.release_ram = self.release_ram;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_switch_comes_after_rounds_or_after_a_time() {
        assert_eq!(rule("0"), Ok(PostcopyRule::AfterRounds(0)));
        assert_eq!(rule("3"), Ok(PostcopyRule::AfterRounds(3)));
        assert_eq!(rule("command"), Ok(PostcopyRule::OnCommand));
        assert_eq!(rule("20s"), Ok(PostcopyRule::AfterTime(Duration::from_secs(20))));
        for wrong in ["", "s", "-1", "1.5", "20m"] {
            assert!(rule(wrong).is_err(), "{wrong}");
        }
    }
}
