//! A file that holds the plain stream (`file:`).

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::transport::{StreamChannel, StreamOptions};

/// Opens `path` to write the stream from its start; what it held is gone. A new file is its owner's alone,
/// since it holds a guest's memory.
pub(crate) fn write_to(path: &Path, options: &StreamOptions) -> io::Result<StreamChannel> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    StreamChannel::from_fd(file.into(), format!("file:{}", path.display()), options)
}

/// Opens `path` to read the stream.
pub(crate) fn read_from(path: &Path, options: &StreamOptions) -> io::Result<StreamChannel> {
    let file = OpenOptions::new().read(true).open(path)?;
    StreamChannel::from_fd(file.into(), format!("file:{}", path.display()), options)
}
