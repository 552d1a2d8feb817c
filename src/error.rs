//! What all errors of this library have in common: their remedies, and how a whole chain of them is told.

use std::error::Error;
use std::fmt;

/// What would help against an error. Its text speaks of this library's settings; a program that has names of its own for
/// them, as the command's options, tells those beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Remedy {
    /// Nothing that a setting of this library changes: this text says what to do.
    Advice(&'static str),
    /// A longer [`StreamOptions::stall`](crate::transport::StreamOptions::stall) or `stall_timeout`.
    RaiseStallTimeout,
    /// A longer `finish_timeout`.
    RaiseFinishTimeout,
    /// A longer `greeting_timeout`.
    RaiseGreetingTimeout,
    /// A higher limit on the RAM that a destination takes.
    RaiseRamLimit,
    /// A guest that writes too fast: more bandwidth, more downtime, deltas, throttling, or an end by force.
    HelpConvergence,
    /// Page channels are written in another way for each version of QEMU: which peer is it?
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
    /// Who may connect.
    AllowPeers,
    /// The name that the destination's certificate is for.
    NameTlsHost,
    /// TLS at both ends, or at none.
    AlignTls,
    /// The names of the sources that may come in.
    ListTlsClients,
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
            Self::ListTlsClients => "name it among those that may come in, if it may",
            Self::AlignTls => "switch TLS on at both ends or at none",
            Self::AllowPeers => "use a network you trust or a tunnel, and name who may connect",
        })
    }
}

/// An error and all of its causes in one line. The errors of this library tell what their own level knows; each cause is
/// behind [`Error::source`], and in no other text.
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
