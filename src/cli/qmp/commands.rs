//! The commands of the monitor: a row for each, with QEMU's name and arguments.

use ramwire::observe::Status;
use serde_json::{Map, Value, json};

use super::failure::Failure;
use super::kind::{Kind, Member, Schema};
use super::plan::{CAPABILITIES, PARAMETERS};
use super::subject::{Role, Subject};

/// Arguments of a command, checked by its row.
pub(super) type Arguments = Map<String, Value>;

/// A command.
pub(super) struct Command {
    pub(super) name: &'static str,
    /// It may overtake others (`exec-oob`).
    pub(super) out_of_band: bool,
    pub(super) arguments: &'static [Member],
    /// Does it. Nothing here waits for the migration.
    pub(super) run: fn(&Subject, &Arguments) -> Result<Value, Failure>,
}

const fn command(
    name: &'static str,
    arguments: &'static [Member],
    run: fn(&Subject, &Arguments) -> Result<Value, Failure>,
) -> Command {
    Command { name, out_of_band: false, arguments, run }
}

/// One that may overtake others.
const fn urgent(
    name: &'static str,
    arguments: &'static [Member],
    run: fn(&Subject, &Arguments) -> Result<Value, Failure>,
) -> Command {
    Command { name, out_of_band: true, arguments, run }
}

/// What `enable` of qmp_capabilities may have.
pub(super) const OUT_OF_BAND: &str = "oob";

/// Answered by the conversation itself.
pub(super) static NEGOTIATE: Command = command(
    "qmp_capabilities",
    &[Member::optional("enable", Kind::List(&Kind::OneOf(&[OUT_OF_BAND])))],
    |_, _| Ok(json!({})),
);

const CAPABILITY: Kind =
    Kind::Object(&[Member::needed("capability", Kind::Text), Member::needed("state", Kind::Bool)]);

static COMMANDS: &[Command] = &[
    command("query-version", &[], |_, _| Ok(version())),
    command("query-status", &[], |subject, _| Ok(query_status(subject))),
    command("query-commands", &[], |subject, _| Ok(query_commands(subject))),
    command("query-qmp-schema", &[], |subject, _| Ok(query_qmp_schema(subject))),
    command("query-migrate", &[], |subject, _| Ok(subject.query_migrate())),
    command("query-migrate-parameters", &[], |subject, _| Ok(subject.plan().parameters())),
    command("migrate-set-parameters", &SETTABLE, |subject, arguments| {
        done(subject.set_parameters(arguments))
    }),
    command("query-migrate-capabilities", &[], |subject, _| Ok(subject.plan().capabilities())),
    command(
        "migrate-set-capabilities",
        &[Member::needed("capabilities", Kind::List(&CAPABILITY))],
        set_capabilities,
    ),
    command("migrate_cancel", &[], |subject, _| done(subject.cancel())),
    command("migrate-continue", &[Member::needed("state", Kind::OneOf(STATES))], migrate_continue),
    command("migrate-start-postcopy", &[], |subject, _| {
        done(subject.ask(ramwire::session::Control::start_postcopy))
    }),
    urgent("migrate-pause", &[], |subject, _| done(subject.ask(ramwire::session::Control::pause))),
    command("quit", &[], |subject, _| done(subject.cancel())),
];

/// The parameters as arguments.
static SETTABLE: [Member; PARAMETERS.len()] = {
    let mut members = [PARAMETERS[0].member; PARAMETERS.len()];
    let mut at = 1;
    while at < members.len() {
        members[at] = PARAMETERS[at].member;
        at += 1;
    }
    members
};

/// What `state` of migrate-continue may be: where a migration is held.
const STATES: &[&str] = &["pre-switchover"];

/// All commands that there are for `subject`, but for the negotiation.
pub(super) fn of(_subject: &Subject) -> impl Iterator<Item = &'static Command> {
    COMMANDS.iter()
}

fn done(what: Result<(), Failure>) -> Result<Value, Failure> {
    what.map(|()| json!({}))
}

/// QEMU's version whose migration commands these are, and what this is in truth.
pub(super) fn version() -> Value {
    json!({
        "qemu": {"major": 10, "minor": 0, "micro": 0},
        "package": concat!("ramwire ", env!("CARGO_PKG_VERSION")),
    })
}

/// The guest never runs here.
fn query_status(subject: &Subject) -> Value {
    let status = subject.statistics().snapshot().status;
    let gone = matches!(
        status,
        Status::Completed | Status::PostcopyActive | Status::PostcopyPaused | Status::PostcopyRecover
    );
    let status = match subject.role() {
        Role::Source if gone => "postmigrate",
        Role::Source => "paused",
    };
    json!({"status": status, "running": false})
}

fn query_commands(subject: &Subject) -> Value {
    let names = of(subject).chain([&NEGOTIATE]).map(|command| json!({"name": command.name}));
    names.collect()
}

fn set_capabilities(subject: &Subject, arguments: &Arguments) -> Result<Value, Failure> {
    let list = arguments.get("capabilities").and_then(Value::as_array).into_iter().flatten();
    let pair = |item: &Value| Some((item["capability"].as_str()?.to_owned(), item["state"].as_bool()?));
    let pairs: Vec<_> = list.filter_map(pair).collect();
    done(subject.set_capabilities(pairs.iter().map(|(name, on)| (name.as_str(), *on))))
}

fn migrate_continue(subject: &Subject, _: &Arguments) -> Result<Value, Failure> {
    if subject.statistics().snapshot().status != Status::PreSwitchover {
        return Err(Failure::generic("the migration is not held before its switchover"));
    }
    done(subject.ask(|control| {
        control.continue_switchover();
        Ok(())
    }))
}

/// Commands with their arguments. What they answer is described no further than as a value.
fn query_qmp_schema(subject: &Subject) -> Value {
    let mut schema = Schema::default();
    let anything = schema.anything();
    for command in of(subject).chain([&NEGOTIATE]) {
        let mut described = json!({
            "name": command.name,
            "meta-type": "command",
            "arg-type": schema.object(command.arguments),
            "ret-type": anything,
        });
        if command.out_of_band {
            described["allow-oob"] = json!(true);
        }
        schema.add(described);
    }
    for (name, members) in super::events::NAMES {
        let arguments = schema.object(members);
        schema.add(json!({"name": name, "meta-type": "event", "arg-type": arguments}));
    }
    let names: Vec<&str> = CAPABILITIES.iter().map(|row| row.name).collect();
    schema.add(json!({
        "name": "MigrationCapability",
        "meta-type": "enum",
        "members": names.iter().map(|name| json!({"name": name})).collect::<Vec<_>>(),
        "values": names,
    }));
    schema.finish()
}
