//! The source's side of an address.

use std::sync::Arc;

use super::scheme::{Opening, TlsCover};
use super::{Address, ConnectionOptions, OpenError, retry};
use crate::error::Remedy;
use crate::guest::GuestMemory;
use crate::sys::Stop;
use crate::transport::{
    ChosenTransport, DeltaCacheSize, InlineLink, PageSending, SourceConnection, SourceLink, StreamChannel,
    StreamOptions, multifd,
};

/// Opens the best available connection to `address` for the pages of `memory`.
///
/// # Errors
/// [`OpenError`].
pub fn open_source(
    address: &Address,
    memory: Arc<dyn GuestMemory>,
    options: &ConnectionOptions,
    stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    check_tls(address)?;
    let (scheme, channels) = (address.row(), &options.channels);
    let in_stream = channels.count == 0 && scheme.abilities.pages_in_stream;
    if options.delta_cache > 0 && !in_stream {
        return Err(OpenError::NoDeltas { address: address.to_string() });
    }
    if let Some((why, remedy)) = channels.no_such_sending() {
        return Err(OpenError::NoSuchSending {
            address: address.to_string(),
            sending: channels.sending,
            why,
            remedy,
        });
    }
    if address.tls().is_some() && channels.sending != PageSending::Copy {
        return Err(OpenError::NoSuchSending {
            address: address.to_string(),
            sending: channels.sending,
            why: "sends pages straight from guest memory, and TLS must encrypt them first",
            remedy: Remedy::Advice("let pages be copied"),
        });
    }
    if channels.count > 0 && !scheme.abilities.page_channels {
        return Err(OpenError::NoChannels { address: address.to_string() });
    }
    let opening = Opening { address, memory: &memory, options, stop };
    retry::retry_until_listening(address, options.retry, stop, || (scheme.open)(&opening))
}

/// Opens a destination as a bare byte stream: connects, starts the command or makes the file.
///
/// # Errors
/// [`OpenError`].
pub fn connect(address: &Address, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
    dial(address, options, stop)?.shaken(stop)
}

/// The same, but the TLS handshake is left to the first bytes.
fn dial(address: &Address, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
    check_tls(address)?;
    let channel = (address.row().connect)(address, options, stop)?;
    let Some(tls) = address.tls() else { return Ok(channel) };
    let host = match address.host_and_port() {
        Some(("", _)) => "127.0.0.1",
        Some((host, _)) => host,
        None => "",
    };
    let secured = channel.over_tls(tls, host);
    secured.map_err(|source| OpenError::Tls { address: address.to_string(), source })
}

/// TLS is only possible for connections that are made here.
pub(super) fn check_tls(address: &Address) -> Result<(), OpenError> {
    match address.tls() {
        Some(_) if address.row().abilities.tls == TlsCover::Nothing => {
            Err(OpenError::NoTls { address: address.to_string() })
        }
        _ => Ok(()),
    }
}

/// Opens a byte stream, and page channels if any are configured: how most schemes open the source's side.
pub(in crate::transport) fn open_stream(opening: &Opening<'_>) -> Result<SourceConnection, OpenError> {
    let Opening { address, memory, options, stop } = *opening;
    let (sink, back) = connect(address, &options.stream, stop)?.with_return_path();
    let link: Box<dyn SourceLink> = match options.channels.count {
        0 => Box::new(
            InlineLink::new(Box::new(sink), Arc::clone(memory))
                .with_deltas(DeltaCacheSize::new(options.delta_cache)),
        ),
        _ => {
            // The channels' threads make the handshakes: a QEMU begins the next handshake only after the first bytes
            // that follow the previous one.
            let open = || dial(address, &options.stream, stop);
            Box::new(multifd::connect(Box::new(sink), Arc::clone(memory), &options.channels, open)?)
        }
    };
    Ok(SourceConnection::new(link, back.map(|back| Box::new(back) as Box<_>))
        .by(ChosenTransport::named(address)))
}
