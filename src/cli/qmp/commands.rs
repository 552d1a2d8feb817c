//! The commands of the monitor: a row for each, with QEMU's name and arguments.

use ramwire::observe::Status;
use ramwire::session::Control;
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
    /// The roles in which it exists.
    roles: &'static [Role],
    pub(super) arguments: &'static [Member],
    /// Does it. Nothing here waits for the migration.
    pub(super) run: fn(&Subject, &Arguments) -> Result<Value, Failure>,
}

/// What a row does.
type Run = fn(&Subject, &Arguments) -> Result<Value, Failure>;

const EVERYWHERE: &[Role] = &[Role::Source, Role::Destination, Role::Relay, Role::Server];
const MIGRATES: &[Role] = &[Role::Source, Role::Destination, Role::Relay];
const SENDS: &[Role] = &[Role::Source, Role::Relay];
const SOURCE: &[Role] = &[Role::Source];
const DESTINATION: &[Role] = &[Role::Destination];

const fn command(
    name: &'static str,
    roles: &'static [Role],
    arguments: &'static [Member],
    run: Run,
) -> Command {
    Command { name, out_of_band: false, roles, arguments, run }
}

/// One that may overtake others.
const fn urgent(
    name: &'static str,
    roles: &'static [Role],
    arguments: &'static [Member],
    run: Run,
) -> Command {
    Command { name, out_of_band: true, roles, arguments, run }
}

/// What `enable` of qmp_capabilities may have.
pub(super) const OUT_OF_BAND: &str = "oob";

/// Answered by the conversation itself.
pub(super) static NEGOTIATE: Command = command(
    "qmp_capabilities",
    EVERYWHERE,
    &[Member::optional("enable", Kind::List(&Kind::OneOf(&[OUT_OF_BAND])))],
    |_, _| Ok(json!({})),
);

const CAPABILITY: Kind =
    Kind::Object(&[Member::needed("capability", Kind::Text), Member::needed("state", Kind::Bool)]);

const URI: Member = Member::needed("uri", Kind::Text);

/// `detach` is what older clients send, and means nothing.
const MIGRATE: &[Member] =
    &[URI, Member::optional("resume", Kind::Bool), Member::optional("detach", Kind::Bool)];

static COMMANDS: &[Command] = &[
    command("query-version", EVERYWHERE, &[], |_, _| Ok(version())),
    command("query-status", EVERYWHERE, &[], |subject, _| Ok(query_status(subject))),
    command("query-commands", EVERYWHERE, &[], |subject, _| Ok(query_commands(subject))),
    command("query-qmp-schema", EVERYWHERE, &[], |subject, _| Ok(query_qmp_schema(subject))),
    command("query-migrate", EVERYWHERE, &[], |subject, _| Ok(subject.query_migrate())),
    command("query-migrate-parameters", SENDS, &[], |subject, _| Ok(subject.plan().parameters())),
    command("migrate-set-parameters", SENDS, &SETTABLE, |subject, arguments| {
        done(subject.set_parameters(arguments))
    }),
    command("query-migrate-capabilities", SENDS, &[], |subject, _| Ok(subject.plan().capabilities())),
    command(
        "migrate-set-capabilities",
        SENDS,
        &[Member::needed("capabilities", Kind::List(&CAPABILITY))],
        set_capabilities,
    ),
    command("migrate", SOURCE, MIGRATE, migrate),
    command("migrate_cancel", MIGRATES, &[], |subject, _| done(subject.cancel())),
    command("migrate-continue", SOURCE, &[Member::needed("state", Kind::OneOf(STATES))], migrate_continue),
    command("migrate-start-postcopy", SOURCE, &[], |subject, _| done(subject.ask(Control::start_postcopy))),
    urgent("migrate-pause", SOURCE, &[], |subject, _| done(subject.ask(Control::pause))),
    urgent("migrate-recover", SOURCE, &[URI], |subject, arguments| {
        done(subject.recover(text(arguments, "uri")))
    }),
    command("x-colo-lost-heartbeat", DESTINATION, &[], |subject, _| done(subject.fail_over())),
    command("quit", EVERYWHERE, &[], |subject, _| done(subject.quit())),
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
pub(super) fn of(subject: &Subject) -> impl Iterator<Item = &'static Command> {
    let role = subject.role();
    COMMANDS.iter().filter(move |command| command.roles.contains(&role))
}

/// An argument of type text that was checked to be there.
fn text<'a>(arguments: &'a Arguments, name: &str) -> &'a str {
    arguments.get(name).and_then(Value::as_str).unwrap_or_default()
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
        Role::Source | Role::Relay if gone => "postmigrate",
        Role::Destination if !gone => "inmigrate",
        Role::Source | Role::Destination | Role::Server => "paused",
        Role::Relay => "inmigrate",
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

fn migrate(subject: &Subject, arguments: &Arguments) -> Result<Value, Failure> {
    let resumes = arguments.get("resume").and_then(Value::as_bool) == Some(true);
    let uri = text(arguments, "uri");
    done(if resumes { subject.recover(uri) } else { subject.migrate(uri) })
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
