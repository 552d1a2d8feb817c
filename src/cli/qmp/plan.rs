//! Parameters and capabilities of a migration under QEMU's names: what they may be, what they are, and which may change
//! when.

use serde_json::{Map, Value, json};

use super::failure::Failure;
use super::kind::{Kind, Member};
use super::subject::Role;

/// When a setting may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Also while the migration runs.
    Always,
    /// The same where the guest's own source is here, which a relay is not.
    AtItsSource,
    /// Only before it begins.
    Before,
}

impl When {
    /// Whether it may change in a migration that runs.
    fn is_now(self, role: Role) -> bool {
        match self {
            Self::Always => true,
            Self::AtItsSource => role == Role::Source,
            Self::Before => false,
        }
    }
}

/// A parameter that a source has.
pub(super) struct Parameter {
    pub(super) member: Member,
    when: When,
    default: Default,
}

/// QEMU's default.
#[derive(Clone, Copy)]
enum Default {
    Number(u64),
    Text(&'static str),
}

const fn parameter(name: &'static str, kind: Kind, when: When, default: Default) -> Parameter {
    Parameter { member: Member::optional(name, kind), when, default }
}

/// Longest downtime that QEMU takes, in milliseconds.
const MAX_DOWNTIME_MS: u64 = 2_000_000;

const fn number(name: &'static str, least: u64, most: u64, when: When, default: u64) -> Parameter {
    parameter(name, Kind::Number(least, most), when, Default::Number(default))
}

/// All parameters, with units as QEMU has them: bytes, bytes a second, milliseconds.
pub(super) static PARAMETERS: &[Parameter] = &[
    number("max-bandwidth", 0, u64::MAX, When::Always, 0),
    number("downtime-limit", 0, MAX_DOWNTIME_MS, When::AtItsSource, 300),
    number("max-postcopy-bandwidth", 0, u64::MAX, When::AtItsSource, 0),
    number("xbzrle-cache-size", 4096, u64::MAX, When::Always, 64 << 20),
    number("multifd-channels", 1, 255, When::Before, 2),
    parameter(
        "multifd-compression",
        Kind::OneOf(&["none", "zlib", "zstd"]),
        When::Before,
        Default::Text("none"),
    ),
    number("multifd-zlib-level", 0, 9, When::Before, 1),
    number("multifd-zstd-level", 0, 20, When::Before, 1),
    parameter(
        "zero-page-detection",
        Kind::OneOf(&["none", "legacy", "multifd"]),
        When::Before,
        Default::Text("multifd"),
    ),
    number("avail-switchover-bandwidth", 0, u64::MAX, When::Before, 0),
];

/// A capability that a source has.
pub(super) struct Capability {
    pub(super) name: &'static str,
    /// If set, its state, which can't be changed.
    pub(super) fixed: Option<bool>,
}

const fn capability(name: &'static str) -> Capability {
    Capability { name, fixed: None }
}

/// All capabilities.
pub(super) static CAPABILITIES: &[Capability] = &[
    capability("xbzrle"),
    capability("rdma-pin-all"),
    Capability { name: "events", fixed: Some(true) },
    capability("postcopy-ram"),
    Capability { name: "return-path", fixed: Some(true) },
    capability("pause-before-switchover"),
    capability("multifd"),
    capability("zero-copy-send"),
    capability("postcopy-preempt"),
];

/// QEMU 10.0's other capabilities. A client that sets all capabilities, these to false, succeeds.
static NOT_OURS: &[&str] = &[
    "auto-converge",
    "zero-blocks",
    "x-colo",
    "release-ram",
    "dirty-bitmaps",
    "postcopy-blocktime",
    "late-block-activate",
    "x-ignore-shared",
    "validate-uuid",
    "background-snapshot",
    "switchover-ack",
    "dirty-limit",
    "mapped-ram",
];

/// What a migration is to be, or is.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::cli) struct Plan {
    parameters: Map<String, Value>,
    /// By the place in [`CAPABILITIES`].
    capabilities: Vec<bool>,
}

impl std::default::Default for Plan {
    fn default() -> Self {
        let value = |row: &Parameter| match row.default {
            Default::Number(number) => json!(number),
            Default::Text(text) => json!(text),
        };
        let parameters = PARAMETERS.iter().map(|row| (row.member.name.to_owned(), value(row))).collect();
        let capabilities = CAPABILITIES.iter().map(|row| row.fixed.unwrap_or(false)).collect();
        Self { parameters, capabilities }
    }
}

impl Plan {
    /// A parameter of type number; 0 if there is none of that name.
    pub(in crate::cli) fn number(&self, name: &str) -> u64 {
        self.parameters.get(name).and_then(Value::as_u64).unwrap_or(0)
    }

    /// A parameter of type text.
    pub(in crate::cli) fn text(&self, name: &str) -> &str {
        self.parameters.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// Whether a capability is on.
    pub(in crate::cli) fn has(&self, name: &str) -> bool {
        place_of(name).is_some_and(|at| self.capabilities[at])
    }

    /// The same with a parameter that the command line has set.
    #[must_use]
    pub(in crate::cli) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.parameters.insert(name.to_owned(), value.into());
        self
    }

    /// The same with a capability that the command line has set.
    #[must_use]
    pub(in crate::cli) fn having(mut self, name: &'static str, on: bool) -> Self {
        if let Some(at) = place_of(name) {
            self.capabilities[at] = on;
        }
        self
    }

    /// The answer to query-migrate-parameters.
    pub(super) fn parameters(&self) -> Value {
        Value::Object(self.parameters.clone())
    }

    /// The answer to query-migrate-capabilities.
    pub(super) fn capabilities(&self) -> Value {
        let rows = CAPABILITIES.iter().zip(&self.capabilities);
        rows.map(|(row, state)| json!({"capability": row.name, "state": state})).collect()
    }

    /// The same with `changes`, whose names and types were checked. Once the migration runs, at `running`, what is decided
    /// by then may be named as it is, and no more.
    ///
    /// # Errors
    /// Nothing is changed.
    pub(super) fn changed(
        &self,
        changes: &Map<String, Value>,
        running: Option<Role>,
    ) -> Result<Self, Failure> {
        let mut new = self.clone();
        for row in PARAMETERS {
            let name = row.member.name;
            let Some(value) = changes.get(name).filter(|value| self.parameters.get(name) != Some(value))
            else {
                continue;
            };
            if let Some(role) = running.filter(|role| !row.when.is_now(*role)) {
                return Err(Failure::generic(format!("'{name}' can't change {}", role.why_not_now())));
            }
            new.parameters.insert(name.to_owned(), value.clone());
        }
        Ok(new)
    }

    /// What goes together, before a migration begins.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.has("multifd") && self.has("xbzrle") {
            return Err("capabilities 'multifd' and 'xbzrle' exclude each other".into());
        }
        for (one, needed) in [("zero-copy-send", "multifd"), ("postcopy-preempt", "postcopy-ram")] {
            if self.has(one) && !self.has(needed) {
                return Err(format!("capability '{one}' needs '{needed}'"));
            }
        }
        Ok(())
    }

    /// The same with capabilities on or off.
    ///
    /// # Errors
    /// There is no such capability, or it can't be so; nothing is changed.
    pub(super) fn switched<'a>(
        &self,
        changes: impl Iterator<Item = (&'a str, bool)>,
    ) -> Result<Self, Failure> {
        let mut new = self.clone();
        for (name, on) in changes {
            match place_of(name) {
                None if !on && NOT_OURS.contains(&name) => {}
                None => return Err(Failure::generic(format!("there is no capability '{name}' here"))),
                Some(at) => match CAPABILITIES[at].fixed {
                    Some(fixed) if fixed != on => {
                        let is = if fixed { "always" } else { "never" };
                        return Err(Failure::generic(format!("capability '{name}' is {is} on here")));
                    }
                    _ => new.capabilities[at] = on,
                },
            }
        }
        Ok(new)
    }
}

fn place_of(name: &str) -> Option<usize> {
    CAPABILITIES.iter().position(|row| row.name == name)
}
