//! Why a command was refused, in the form of the protocol.

use serde_json::{Value, json};

/// The protocol's classes of errors. Clients evaluate them; errors for which QEMU has no class are generic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub(super) enum Class {
    GenericError,
    CommandNotFound,
}

/// A refusal. The text is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    class: Class,
    text: String,
}

impl Failure {
    pub(super) fn generic(text: impl Into<String>) -> Self {
        Self { class: Class::GenericError, text: text.into() }
    }

    pub(super) fn no_such_command(text: impl Into<String>) -> Self {
        Self { class: Class::CommandNotFound, text: text.into() }
    }

    /// The value of `error` in an answer.
    pub(super) fn to_json(&self) -> Value {
        json!({"class": self.class, "desc": self.text})
    }
}
