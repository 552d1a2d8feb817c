//! A descriptor that this program was started with (`fd:`).

use super::opened;
use crate::sys::take_inherited_fd;
use crate::transport::open::{OneStream, Scheme, SchemeAbilities, open_stream, parse_descriptor};
use crate::transport::{Address, OpenError, StreamChannel, StreamOptions};

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "fd",
    form: "fd:N",
    hint: "fd:N with the descriptor's number",
    parse: parse_descriptor,
    abilities: SchemeAbilities { page_channels: false, pages_in_stream: true, decides_late: false },
    open: open_stream,
    connect: |address, options, _| take(address, options),
    listen: |address, _, _| Ok(OneStream::at(address, take)),
};

fn take(address: &Address, options: &StreamOptions) -> Result<StreamChannel, OpenError> {
    let taken = take_inherited_fd(address.descriptor())
        .and_then(|fd| StreamChannel::from_fd(fd, address.to_string(), options));
    opened(address, "pass an open stream socket or pipe to the process and give its number", taken)
}
