//! One client's conversation with the monitor: bytes in, lines out. No socket, no clock.
//!
//! The client first negotiates (`qmp_capabilities`), then gives commands. Each gets one answer, in order, with the
//! client's `id`: no command waits, so one that may overtake others (`exec-oob`) finds none to overtake.

use serde_json::{Map, Value, json};

use super::commands::{self, Arguments, Command, NEGOTIATE, OUT_OF_BAND};
use super::failure::Failure;
use super::framing::{Damage, Framing};
use super::kind::check_members;
use super::subject::Subject;

/// One client.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    framing: Framing,
    negotiated: bool,
    /// `exec-oob` was requested.
    out_of_band: bool,
    /// It is no client of this protocol.
    not_qmp: bool,
}

/// A command as it was understood.
struct Request<'a> {
    name: &'a str,
    out_of_band: bool,
    arguments: Arguments,
}

impl Conversation {
    /// The first message to a client.
    pub(super) fn greeting() -> String {
        line(&json!({"QMP": {"version": commands::version(), "capabilities": [OUT_OF_BAND]}}))
    }

    /// True once events may be sent.
    pub(super) fn takes_events(&self) -> bool {
        self.negotiated
    }

    /// True once the client has sent something before the negotiation that is no JSON: for example a browser, which a
    /// web page made send commands to a port of this host after its own lines. None of its commands is executed.
    pub(super) fn is_not_qmp(&self) -> bool {
        self.not_qmp
    }

    /// Takes bytes off `input` up to the end of one command, does that on `subject`, and gives the answer. `None`: all bytes
    /// are taken, and no command is whole.
    pub(super) fn next(&mut self, input: &mut &[u8], subject: &Subject) -> Option<String> {
        if self.not_qmp {
            *input = &[];
            return None;
        }
        let (answer, id) = match self.framing.next(input)? {
            Err(Damage::Syntax(text)) if !self.negotiated => {
                self.not_qmp = true;
                (Err(Failure::generic(format!("this is a monitor, and that is no JSON: {text}"))), None)
            }
            Err(damage) => (Err(Failure::generic(damage.to_string())), None),
            Ok(Value::Object(mut object)) => {
                let id = object.remove("id");
                (self.execute(object, subject), id)
            }
            Ok(_) => (Err(Failure::generic("a command is a JSON object")), None),
        };
        let mut out = match answer {
            Ok(value) => json!({ "return": value }),
            Err(failure) => json!({ "error": failure.to_json() }),
        };
        if let Some(id) = id {
            out["id"] = id;
        }
        Some(line(&out))
    }

    fn execute(&mut self, object: Map<String, Value>, subject: &Subject) -> Result<Value, Failure> {
        let request = self.understand(&object)?;
        let known = commands::of(subject).chain([&NEGOTIATE]);
        let command = known.into_iter().find(|command| command.name == request.name);
        match command {
            Some(command) if command.name == NEGOTIATE.name => self.negotiate(&request, command),
            _ if !self.negotiated => {
                let first = NEGOTIATE.name;
                Err(Failure::no_such_command(format!("'{first}' comes before any other command")))
            }
            Some(command) => {
                check(&request, command)?;
                (command.run)(subject, &request.arguments)
            }
            None => Err(Failure::no_such_command(format!("there is no command '{}' here", request.name))),
        }
    }

    fn understand<'a>(&self, object: &'a Map<String, Value>) -> Result<Request<'a>, Failure> {
        let mut request = None;
        let mut arguments = Arguments::default();
        for (name, value) in object {
            match (name.as_str(), value) {
                ("execute" | "exec-oob", _) if request.is_some() => {
                    return Err(Failure::generic("'execute' and 'exec-oob' exclude each other"));
                }
                ("execute", Value::String(command)) => request = Some((command, false)),
                ("exec-oob", Value::String(command)) if self.out_of_band => request = Some((command, true)),
                ("exec-oob", Value::String(_)) => {
                    return Err(Failure::generic("'exec-oob' must be asked for with qmp_capabilities"));
                }
                ("execute" | "exec-oob", _) => {
                    return Err(Failure::generic(format!("'{name}' must be a string")));
                }
                ("arguments", Value::Object(given)) => arguments = given.clone(),
                ("arguments", _) => return Err(Failure::generic("'arguments' must be an object")),
                _ => return Err(Failure::generic(format!("'{name}' is no member of a command"))),
            }
        }
        let (name, out_of_band) =
            request.ok_or_else(|| Failure::generic("'execute' is missing: it names the command"))?;
        Ok(Request { name, out_of_band, arguments })
    }

    fn negotiate(&mut self, request: &Request<'_>, command: &Command) -> Result<Value, Failure> {
        if self.negotiated {
            let name = command.name;
            return Err(Failure::no_such_command(format!("'{name}' was given before, and comes once")));
        }
        check(request, command)?;
        let enable = request.arguments.get("enable").and_then(Value::as_array);
        // The only one that there is.
        self.out_of_band = enable.is_some_and(|list| !list.is_empty());
        self.negotiated = true;
        Ok(json!({}))
    }
}

fn check(request: &Request<'_>, command: &Command) -> Result<(), Failure> {
    if request.out_of_band && !command.out_of_band {
        return Err(Failure::generic(format!("'{}' can't be given by 'exec-oob'", command.name)));
    }
    check_members(command.arguments, &request.arguments)
}

/// As a line of its own.
pub(super) fn line(value: &Value) -> String {
    format!("{value}\r\n")
}
