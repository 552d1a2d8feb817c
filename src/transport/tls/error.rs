//! Why there is no TLS connection, and what would help.

use std::path::PathBuf;

use crate::error::Remedy;

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The program was built without it.
    #[error("this ramwire was built without the `tls` feature")]
    NotBuilt,
    /// A file of the folder can't be used.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what would help.
        what: String,
    },
    /// There is no name that the destination's certificate could be for.
    #[error("{name:?} is no name that a certificate can be for; {}", Remedy::NameTlsHost)]
    NoName {
        /// What the address has in place of one; empty for a path.
        name: String,
    },
    /// The handshake, or what came later, was refused by one of the ends.
    #[error("{what}; {remedy}")]
    Refused {
        /// What was refused, and by whom.
        what: String,
        /// What would help.
        remedy: Remedy,
    },
}

impl TlsError {
    /// What would help, where a setting does.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::NoName { .. } => Some(Remedy::NameTlsHost),
            Self::Refused { remedy, .. } => Some(*remedy),
            Self::NotBuilt | Self::File { .. } => None,
        }
    }
}
