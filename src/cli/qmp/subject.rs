//! The migration that a monitor speaks for.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ramwire::observe::{SharedStatistics, Status};
use ramwire::session::{CancelReply, Control};
use ramwire::units::Rate;
use serde_json::{Map, Value, json};

use super::super::remedies::in_words;
use super::failure::Failure;
use super::plan::Plan;

/// Which side of a migration it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Role {
    /// Sends a guest that stands still.
    Source,
}

/// Asks for the end.
type Cancels = Box<dyn Fn() -> CancelReply + Send + Sync>;

/// What the commands act on. Nothing here waits for the migration.
pub(in crate::cli) struct Subject {
    role: Role,
    statistics: SharedStatistics,
    cancels: Cancels,
    state: Mutex<State>,
}

struct State {
    plan: Plan,
    /// There once the connection is.
    control: Option<Control>,
}

impl Subject {
    /// A source whose migration begins as `plan` says. `cancels` is asked until there is a [`Control`].
    pub(in crate::cli) fn source(
        statistics: SharedStatistics,
        plan: Plan,
        cancels: impl Fn() -> CancelReply + Send + Sync + 'static,
    ) -> Self {
        let state = Mutex::new(State { plan, control: None });
        Self { role: Role::Source, statistics, cancels: Box::new(cancels), state }
    }

    /// From here on changes go to the migration itself, what was changed before as well.
    pub(in crate::cli) fn follow(&self, control: Control) {
        let mut state = self.state();
        apply(&control, None, &state.plan).unwrap_or_else(|failure| {
            tracing::warn!(?failure, "a parameter that was set while the connection was made has no effect");
        });
        state.control = Some(control);
    }

    pub(super) fn role(&self) -> Role {
        self.role
    }

    pub(super) fn statistics(&self) -> &SharedStatistics {
        &self.statistics
    }

    pub(super) fn plan(&self) -> Plan {
        self.state().plan.clone()
    }

    /// Changes parameters, all or none.
    pub(super) fn set_parameters(&self, changes: &Map<String, Value>) -> Result<(), Failure> {
        let mut state = self.state();
        let new = state.plan.changed(changes, true)?;
        if let Some(control) = &state.control {
            apply(control, Some(&state.plan), &new)?;
        }
        state.plan = new;
        Ok(())
    }

    /// Switches capabilities, all or none: once the migration has begun, each may be named as it is, and no more.
    pub(super) fn set_capabilities<'a>(
        &self,
        changes: impl Iterator<Item = (&'a str, bool)>,
    ) -> Result<(), Failure> {
        let plan = self.plan();
        if plan.switched(changes)? == plan {
            return Ok(());
        }
        Err(Failure::generic("capabilities are decided when the migration begins, and it has begun"))
    }

    /// Asks for the end.
    pub(super) fn cancel(&self) -> Result<(), Failure> {
        if self.statistics.snapshot().ended {
            return Ok(());
        }
        let control = self.state().control.clone();
        let reply = match control {
            Some(control) => control.cancel(),
            None => (self.cancels)(),
        };
        match reply {
            CancelReply::Accepted => Ok(()),
            CancelReply::TooLate => Err(Failure::generic(
                "it is too late: the guest was given away, and the migration runs to its end",
            )),
        }
    }

    /// Does what only a migration that runs can.
    pub(super) fn ask(
        &self,
        what: impl FnOnce(&Control) -> Result<(), ramwire::session::Error>,
    ) -> Result<(), Failure> {
        let control = self.state().control.clone();
        let Some(control) = control.filter(|_| !self.statistics.snapshot().ended) else {
            return Err(Failure::generic("no migration runs"));
        };
        what(&control).map_err(|error| Failure::generic(in_words(&error)))
    }

    /// The answer to query-migrate.
    pub(super) fn query_migrate(&self) -> Value {
        let now = self.statistics.snapshot();
        if now.status == Status::None { json!({}) } else { now.query_migrate() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Has `control` follow `new`, where that differs from `old`.
fn apply(control: &Control, old: Option<&Plan>, new: &Plan) -> Result<(), Failure> {
    let changed = |name: &str| {
        let value = new.number(name);
        old.is_none_or(|old| old.number(name) != value).then_some(value)
    };
    // First what can be refused: then nothing else has changed.
    if let Some(bytes) = changed("xbzrle-cache-size") {
        match (new.has("xbzrle"), old) {
            (true, _) => control.set_delta_cache(bytes).map_err(|e| Failure::generic(in_words(&e)))?,
            (false, None) => {}
            (false, Some(_)) => {
                return Err(Failure::generic("capability 'xbzrle' is off: there is no cache"));
            }
        }
    }
    if let Some(rate) = changed("max-bandwidth") {
        control.set_max_bandwidth(Rate::limit(rate));
    }
    if let Some(rate) = changed("max-postcopy-bandwidth") {
        control.set_postcopy_bandwidth(Rate::limit(rate));
    }
    if let Some(limit) = changed("downtime-limit") {
        control.set_downtime_limit(Duration::from_millis(limit));
    }
    Ok(())
}
