//! The migration that a monitor controls.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam::channel::Sender;
use ramwire::observe::{SharedStatistics, Status};
use ramwire::session::{CancelReply, Control, Error};
use ramwire::transport::Address;
use ramwire::units::Rate;
use serde_json::{Map, Value, json};

use super::super::remedies::in_words;
use super::failure::Failure;
use super::plan::Plan;

/// Which side of a migration it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Role {
    /// Sends a paused guest.
    Source,
    /// Takes a guest.
    Destination,
    /// Takes one that runs elsewhere, and sends it on.
    Relay,
    /// Serves memory to others: nothing is migrated.
    Server,
}

impl Role {
    /// Why something that is decided at the beginning can't change, behind "can't change".
    pub(super) fn why_not_now(self) -> &'static str {
        match self {
            Self::Source => "any more: it is decided when the migration begins, and it has begun",
            Self::Destination => "here: the options of the command and the source decide it",
            Self::Relay => {
                "at a relay: its own options decide it when it starts, and the guest's source the rest"
            }
            Self::Server => "here: nothing is migrated",
        }
    }
}

/// A client's request to the command, other than about the running migration.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::cli) enum Order {
    /// Send the guest there, according to the plan.
    Migrate(Box<(Address, Plan)>),
    /// End the process: nothing runs.
    Quit,
}

/// Requests the end.
type Cancels = Box<dyn Fn() -> CancelReply + Send + Sync>;
/// Lets the guest of a source that is dead go on from its last checkpoint; an error says why not.
type FailsOver = Box<dyn Fn() -> Result<(), String> + Send + Sync>;
/// What changes the migration while it runs, once that is there.
type Controls = Box<dyn Fn() -> Option<Control> + Send + Sync>;
/// Converts an address that a client names to the one to connect to; an error says why not.
type Admits = Box<dyn Fn(&str) -> Result<Address, String> + Send + Sync>;

/// What the commands act on. Nothing here waits for the migration.
pub(in crate::cli) struct Subject {
    role: Role,
    statistics: SharedStatistics,
    cancels: Cancels,
    controls: Controls,
    admits: Admits,
    orders: Option<Sender<Order>>,
    fails_over: Option<FailsOver>,
    state: Mutex<State>,
}

struct State {
    plan: Plan,
    /// The migration has begun, or is about to.
    begun: bool,
    /// A cancel was accepted.
    cancelled: bool,
}

impl Subject {
    /// A migration with these figures. `cancels` requests its end.
    pub(in crate::cli) fn new(
        role: Role,
        statistics: SharedStatistics,
        plan: Plan,
        cancels: impl Fn() -> CancelReply + Send + Sync + 'static,
    ) -> Self {
        let state = Mutex::new(State { plan, begun: true, cancelled: false });
        Self {
            role,
            statistics,
            cancels: Box::new(cancels),
            controls: Box::new(|| None),
            admits: Box::new(|_| Err("no address is taken here".into())),
            orders: None,
            fails_over: None,
            state,
        }
    }

    /// `controls` gives what changes it while it runs.
    pub(in crate::cli) fn controlled(
        mut self,
        controls: impl Fn() -> Option<Control> + Send + Sync + 'static,
    ) -> Self {
        self.controls = Box::new(controls);
        self
    }

    /// It keeps checkpoints, and `fails_over` ends that.
    pub(in crate::cli) fn with_failover(
        mut self,
        fails_over: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.fails_over = Some(Box::new(fails_over));
        self
    }

    /// A client may name addresses that `admits` takes.
    pub(in crate::cli) fn admitting(
        mut self,
        admits: impl Fn(&str) -> Result<Address, String> + Send + Sync + 'static,
    ) -> Self {
        self.admits = Box::new(admits);
        self
    }

    /// It begins at a client's command, and the process ends at a client's command.
    pub(in crate::cli) fn waiting(mut self, orders: Sender<Order>) -> Self {
        self.orders = Some(orders);
        self.state().begun = false;
        self
    }

    /// `controls` returns the control from now on: applies the earlier changes to it.
    pub(in crate::cli) fn follow(&self, control: &Control) {
        // Held: a change that arrives meanwhile is not undone by an older one.
        let state = self.state();
        if let Err(failure) = apply(control, None, &state.plan) {
            tracing::warn!(?failure, "a parameter that was set while the connection was made has no effect");
        }
    }

    /// What it is, or is to be.
    pub(in crate::cli) fn plan(&self) -> Plan {
        self.state().plan.clone()
    }

    pub(super) fn role(&self) -> Role {
        self.role
    }

    pub(super) fn statistics(&self) -> &SharedStatistics {
        &self.statistics
    }

    /// Changes parameters, all or none.
    pub(super) fn set_parameters(&self, changes: &Map<String, Value>) -> Result<(), Failure> {
        let mut state = self.state();
        let new = state.plan.changed(changes, state.begun.then_some(self.role))?;
        match (self.controls)() {
            _ if new == state.plan => {}
            Some(control) => apply(&control, Some(&state.plan), &new)?,
            None if self.role == Role::Relay => {
                return Err(Failure::generic(
                    "the far end is not connected yet: only then it can be changed",
                ));
            }
            // Applied by `follow`.
            None => {}
        }
        state.plan = new;
        Ok(())
    }

    /// Switches capabilities, all or none: once the migration has begun, each may be named as it is, and no more.
    pub(super) fn set_capabilities<'a>(
        &self,
        changes: impl Iterator<Item = (&'a str, bool)>,
    ) -> Result<(), Failure> {
        let mut state = self.state();
        let new = state.plan.switched(changes)?;
        if state.begun && new != state.plan {
            let text = format!("capabilities can't change {}", self.role.why_not_now());
            return Err(Failure::generic(text));
        }
        state.plan = new;
        Ok(())
    }

    /// Begins the migration.
    pub(super) fn migrate(&self, uri: &str) -> Result<(), Failure> {
        let mut state = self.state();
        let Some(orders) = self.orders.as_ref().filter(|_| !state.begun) else {
            return Err(Failure::generic("a migration has begun already, and there is one only"));
        };
        let address = (self.admits)(uri).map_err(Failure::generic)?;
        state.plan.check().map_err(Failure::generic)?;
        state.begun = true;
        // The receiver exists as long as the command waits.
        let _ = orders.send(Order::Migrate(Box::new((address, state.plan.clone()))));
        Ok(())
    }

    /// Continues over another connection.
    pub(super) fn recover(&self, uri: &str) -> Result<(), Failure> {
        let address = (self.admits)(uri).map_err(Failure::generic)?;
        self.ask(|control| control.recover(address))
    }

    /// Requests the end of the running migration.
    pub(super) fn cancel(&self) -> Result<(), Failure> {
        if !self.runs() {
            return Ok(());
        }
        match (self.cancels)() {
            CancelReply::Accepted => {
                self.state().cancelled = true;
                Ok(())
            }
            CancelReply::TooLate => Err(Failure::generic(
                "it is too late: the guest was given away, and the migration runs to its end",
            )),
        }
    }

    /// The source is dead, as its operator says.
    pub(super) fn fail_over(&self) -> Result<(), Failure> {
        match &self.fails_over {
            Some(fails_over) => fails_over().map_err(Failure::generic),
            None => Err(Failure::generic("no checkpoints are kept here (receive --colo keeps them)")),
        }
    }

    /// Ends the process; what runs is cancelled before.
    pub(super) fn quit(&self) -> Result<(), Failure> {
        self.cancel()?;
        if let Some(orders) = &self.orders {
            // Without a receiver the process ends with its migration.
            let _ = orders.send(Order::Quit);
        }
        Ok(())
    }

    /// Does what only a migration that runs can.
    pub(super) fn ask(&self, what: impl FnOnce(&Control) -> Result<(), Error>) -> Result<(), Failure> {
        let Some(control) = (self.controls)().filter(|_| self.runs()) else {
            return Err(Failure::generic("no migration runs"));
        };
        what(&control).map_err(|error| Failure::generic(in_words(&error)))
    }

    /// The answer to query-migrate.
    pub(super) fn query_migrate(&self) -> Value {
        let now = self.statistics.snapshot();
        if now.status == Status::None {
            return json!({});
        }
        let mut told = now.query_migrate();
        if self.state().cancelled && !now.ended {
            told["status"] = json!("cancelling");
        }
        // QEMU has figures of a migration that continues, or has arrived.
        if let (Status::Setup | Status::Failed | Status::Cancelled, Some(told)) =
            (now.status, told.as_object_mut())
        {
            told.retain(|name, _| ["status", "error-desc"].contains(&name.as_str()));
        }
        told
    }

    /// True from the begin to the end.
    fn runs(&self) -> bool {
        self.state().begun && !self.statistics.snapshot().ended
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
