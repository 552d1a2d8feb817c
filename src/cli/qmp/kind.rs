//! The permitted values of an argument, a parameter or a capability: checked, and described to clients, from one
//! description.

use serde_json::{Map, Value, json};

use super::failure::Failure;

/// A type of JSON with its bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// A whole number from one bound to the other.
    Number(u64, u64),
    Bool,
    Text,
    /// One of these strings.
    OneOf(&'static [&'static str]),
    /// An array.
    List(&'static Kind),
    /// An object of these members.
    Object(&'static [Member]),
}

/// A member of an object: for example an argument of a command.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Member {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) optional: bool,
}

impl Member {
    pub(super) const fn needed(name: &'static str, kind: Kind) -> Self {
        Self { name, kind, optional: false }
    }

    pub(super) const fn optional(name: &'static str, kind: Kind) -> Self {
        Self { name, kind, optional: true }
    }
}

impl Kind {
    /// Any number.
    pub(super) const SIZE: Self = Self::Number(0, u64::MAX);

    /// Whether `value`, which is called `name`, is one.
    pub(super) fn check(self, name: &str, value: &Value) -> Result<(), Failure> {
        let wanted = match self {
            Self::Number(least, most) => match value.as_u64() {
                Some(number) if (least..=most).contains(&number) => return Ok(()),
                _ if most == u64::MAX => format!("a whole number from {least} on"),
                _ => format!("a whole number from {least} to {most}"),
            },
            Self::Bool if value.is_boolean() => return Ok(()),
            Self::Bool => "true or false".into(),
            Self::Text if value.is_string() => return Ok(()),
            Self::Text => "a string".into(),
            Self::OneOf(words) => match value.as_str() {
                Some(word) if words.contains(&word) => return Ok(()),
                _ => format!("one of {}", words.join(", ")),
            },
            Self::List(kind) => match value.as_array() {
                Some(items) => return items.iter().try_for_each(|item| kind.check(name, item)),
                None => "an array".into(),
            },
            Self::Object(members) => match value.as_object() {
                Some(object) => return check_members(members, object),
                None => "an object".into(),
            },
        };
        Err(Failure::generic(format!("'{name}' must be {wanted}")))
    }
}

/// Each of `members` is there that must be, nothing else is, and all are what they must be.
pub(super) fn check_members(members: &[Member], object: &Map<String, Value>) -> Result<(), Failure> {
    for (name, value) in object {
        match members.iter().find(|member| member.name == name) {
            Some(member) => member.kind.check(name, value)?,
            None => return Err(Failure::generic(format!("'{name}' is not known here"))),
        }
    }
    match members.iter().find(|member| !member.optional && !object.contains_key(member.name)) {
        Some(missing) => Err(Failure::generic(format!("'{}' is missing", missing.name))),
        None => Ok(()),
    }
}

/// The answer to query-qmp-schema as it is made: types get names in the order in which they are found.
#[derive(Debug, Default)]
pub(super) struct Schema(Vec<Value>);

impl Schema {
    /// The name of the type of `kind`.
    pub(super) fn type_of(&mut self, kind: Kind) -> String {
        let (name, description) = match kind {
            Kind::Number(..) => return self.built_in("int", "int"),
            Kind::Bool => return self.built_in("bool", "boolean"),
            Kind::Text => return self.built_in("str", "string"),
            Kind::OneOf(words) => {
                let members: Vec<Value> = words.iter().map(|word| json!({ "name": word })).collect();
                (words.join("|"), json!({"meta-type": "enum", "members": members, "values": words}))
            }
            Kind::List(of) => {
                let of = self.type_of(*of);
                (format!("[{of}]"), json!({"meta-type": "array", "element-type": of}))
            }
            Kind::Object(members) => return self.object(members),
        };
        self.named(name, description)
    }

    /// The name of the type of an object with these members.
    pub(super) fn object(&mut self, members: &[Member]) -> String {
        let mut list = Vec::new();
        for member in members {
            let mut described = json!({"name": member.name, "type": self.type_of(member.kind)});
            if member.optional {
                described["default"] = Value::Null;
            }
            list.push(described);
        }
        let names: Vec<&str> = members.iter().map(|member| member.name).collect();
        self.named(format!("{{{}}}", names.join(",")), json!({"meta-type": "object", "members": list}))
    }

    /// A type whose values are not described further.
    pub(super) fn anything(&mut self) -> String {
        self.built_in("any", "value")
    }

    /// A command or an event.
    pub(super) fn add(&mut self, description: Value) {
        self.0.push(description);
    }

    pub(super) fn finish(self) -> Value {
        Value::Array(self.0)
    }

    fn built_in(&mut self, name: &str, json_type: &str) -> String {
        self.named(name.into(), json!({"meta-type": "builtin", "json-type": json_type}))
    }

    fn named(&mut self, name: String, mut description: Value) -> String {
        description["name"] = json!(name);
        if !self.0.iter().any(|known| known["name"] == description["name"]) {
            self.0.push(description);
        }
        name
    }
}
