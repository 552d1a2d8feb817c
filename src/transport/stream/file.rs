//! A file that holds the plain stream (`file:`).

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::opened;
use crate::transport::open::{OneStream, Scheme, SchemeAbilities, TlsCover, open_stream, parse_file};
use crate::transport::{StreamChannel, StreamOptions};

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "file",
    form: "file:PATH",
    hint: "file:/path/of/the/stream",
    parse: parse_file,
    abilities: SchemeAbilities {
        page_channels: false,
        pages_in_stream: true,
        answers: false,
        tls: TlsCover::Nothing,
        decides_late: false,
    },
    open: open_stream,
    connect: |address, options, _| opened(address, REMEDY, write_to(address.file(), options)),
    listen: |address, _, _| {
        Ok(OneStream::at(address, |address, options| {
            opened(address, REMEDY, read_from(address.file(), options))
        }))
    },
};

const REMEDY: &str = "check that the path exists and may be opened";

/// Opens `path` to write the stream from its start; the old content is deleted in front of the first byte, since a
/// migration may be refused before that. Only the owner may access a new file, since it holds a guest's memory.
fn write_to(path: &Path, options: &StreamOptions) -> io::Result<StreamChannel> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let channel = StreamChannel::from_fd(file.into(), format!("file:{}", path.display()), options)?;
    Ok(channel.emptied_first())
}

/// Opens `path` to read the stream.
fn read_from(path: &Path, options: &StreamOptions) -> io::Result<StreamChannel> {
    let file = OpenOptions::new().read(true).open(path)?;
    StreamChannel::from_fd(file.into(), format!("file:{}", path.display()), options)
}
