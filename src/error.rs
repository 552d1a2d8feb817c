//! Common parts of this library's errors: their remedies, and the text of a whole chain of errors.

use std::error::Error;
use std::fmt;

/// The remedy for an error. Its text names this library's settings; a program with names of its own for them, such as
/// the command's options, adds those.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Remedy {
    /// No setting of this library helps: this text is the advice.
    Advice(&'static str),
    /// A longer [`StreamOptions::stall`](crate::transport::StreamOptions::stall) or `stall_timeout`.
    RaiseStallTimeout,
    /// A longer `finish_timeout`.
    RaiseFinishTimeout,
    /// A longer `greeting_timeout`.
    RaiseGreetingTimeout,
    /// A higher limit on the RAM that a destination accepts.
    RaiseRamLimit,
    /// For a guest that writes too fast: more bandwidth, more downtime, deltas, throttling, or a forced end.
    HelpConvergence,
    /// The peer's version: the format of page channels depends on the version of QEMU.
    NamePeer,
    /// As many page channels as the source has.
    AskForChannels,
    /// Page channels at both ends or at none.
    AlignChannels,
    /// Deltas or page channels, not both.
    DropDeltasOrChannels,
    /// No page channels, or an address that has them.
    DropChannels,
    /// Pages copied into the sockets, or page channels.
    CopyPagesOrAskForChannels,
    /// Pages copied into the sockets, or no compression.
    CopyPagesOrDropCompression,
    /// The hosts that may connect.
    AllowPeers,
    /// The name that the destination's certificate is for.
    NameTlsHost,
    /// TLS at both ends, or at none.
    AlignTls,
    /// The names of the sources that may connect.
    ListTlsClients,
    /// Connections for urgent pages on both sides of a relay, or at neither end.
    AlignUrgent,
}

impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Advice(text) => text,
            Self::RaiseStallTimeout => "raise the stall timeout if it is only slow",
            Self::RaiseFinishTimeout => "raise the finish timeout if it is only slow",
            Self::RaiseGreetingTimeout => "raise the greeting timeout if it is only slow",
            Self::RaiseRamLimit => "raise the destination's limit on RAM if the guest is that large",
            Self::HelpConvergence => {
                "raise the bandwidth limit or the downtime limit, send differences, slow the guest down, or let the time \
                 limit finish it"
            }
            Self::NamePeer => "say which peer it is: QEMU 7.2, QEMU 10.0 or ramwire",
            Self::AskForChannels => "ask for as many page channels as it has",
            Self::AlignChannels => "set multifd and the number of its channels alike at both ends",
            Self::DropDeltasOrChannels => "leave the deltas or the page channels out",
            Self::DropChannels => "use tcp: or unix:, or leave the page channels out",
            Self::CopyPagesOrAskForChannels => "let pages be copied, or ask for page channels",
            Self::CopyPagesOrDropCompression => "let pages be copied, or leave compression out",
            Self::NameTlsHost => "issue a certificate for it, or give the name that its certificate is for",
            Self::ListTlsClients => "add it to the clients that may connect, if it may",
            Self::AlignUrgent => {
                "give the relay connections for urgent pages, or turn postcopy-preempt off at both ends; postcopy-ram may stay \
                 on"
            }
            Self::AlignTls => "switch TLS on at both ends or at none",
            Self::AllowPeers => "use a network you trust or a tunnel, and name who may connect",
        })
    }
}

/// An error and all its causes in one line. The text of each error of this library contains only what its own level
/// knows; its cause is in [`Error::source`] and in no other text.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn a_chain_tells_every_cause_once() {
        let error = Outer(std::io::Error::other("inner"));
        assert_eq!(Chain(&error).to_string(), "outer: inner");
    }
}
