//! The channel on which a QEMU passes its guest's memory in mode cpr-transfer, ahead of its migration.
//!
//! The QEMU stops its guest, sends the names of descriptors and the descriptors, and waits until this end closes the
//! connection. Then it connects for the migration itself, in which no page is sent.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::event::PollFlags;

use super::open::Listening;
use super::stream::unix::UnixListener;
use crate::ram::BlockName;
use crate::stream::qemu::cpr::{CprStateError, MAX_CPR_STATE, decode_cpr_state};
use crate::sys::{RecvPart, Stop};
use crate::transport::{ByteSource, ChannelError, OpenError, StreamChannel, StreamOptions};

/// Why memory did not come.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CprError {
    /// The connection.
    #[error("the cpr channel")]
    Channel(#[from] ChannelError),
    /// The received bytes are no list of descriptors.
    #[error("what came on the cpr channel is not understood")]
    State(#[from] CprStateError),
    /// It is longer than any guest's.
    #[error("more than {MAX_CPR_STATE} bytes came on the cpr channel; is it the migration's own?")]
    Long,
    /// Descriptors are missing, or there are more.
    #[error("{names} descriptors were announced on the cpr channel, and {came} came")]
    Descriptors {
        /// Number of names that arrived.
        names: usize,
        /// Number of descriptors that arrived.
        came: usize,
    },
}

/// Listens for the channel.
#[derive(Debug)]
pub struct CprListener {
    listening: UnixListener,
    options: StreamOptions,
}

/// The memory that a QEMU has passed; it waits until this is [taken](Self::hang_up).
#[derive(Debug)]
pub struct CprMemory {
    _channel: StreamChannel,
    memory: Vec<(BlockName, OwnedFd)>,
}

impl CprListener {
    /// Listens at `path`, which only its owner may connect to.
    ///
    /// # Errors
    /// [`OpenError::Open`].
    pub fn bind(path: &Path, options: &StreamOptions) -> Result<Self, OpenError> {
        Ok(Self { listening: UnixListener::bind(path)?, options: *options })
    }

    /// Waits for a QEMU and reads what it passes.
    ///
    /// # Errors
    /// [`CprError`].
    pub fn accept(self, stop: &Stop) -> Result<CprMemory, CprError> {
        const WAITING: &str = "waiting for a QEMU on the cpr channel";
        let mut channel =
            loop {
                for socket in self.listening.sockets() {
                    let waited = stop.wait(socket.as_fd(), PollFlags::IN).map_err(|source| {
                        ChannelError::Io { peer: self.listening.place(), doing: WAITING, source }
                    })?;
                    if let Some(reason) = waited {
                        return Err(ChannelError::Stopped { reason, doing: WAITING }.into());
                    }
                }
                if let Some(channel) = self.listening.take(&self.options)? {
                    break channel;
                }
            };
        channel.want_descriptors(true);
        let (mut bytes, mut descriptors) = (Vec::new(), Vec::new());
        loop {
            let mut buffer = [0; 4096];
            let got = channel.recv(&mut [RecvPart::Own(&mut buffer)], stop)?;
            descriptors.extend(std::iter::from_fn(|| channel.next_descriptor()));
            if got == 0 {
                break;
            }
            bytes.extend_from_slice(&buffer[..got]);
            if bytes.len() > MAX_CPR_STATE || descriptors.len() > bytes.len() {
                return Err(CprError::Long);
            }
        }
        let names = decode_cpr_state(&bytes)?;
        if names.len() != descriptors.len() {
            return Err(CprError::Descriptors { names: names.len(), came: descriptors.len() });
        }
        Ok(CprMemory { _channel: channel, memory: names.into_iter().zip(descriptors).collect() })
    }
}

impl CprMemory {
    /// Closes the connection: the QEMU connects for its migration now, and a listener must exist. Returns the memory,
    /// by its blocks.
    pub fn hang_up(self) -> Vec<(BlockName, OwnedFd)> {
        self.memory
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::sys::{Mapping, send_with_descriptor};

    fn passed(
        names: &[&str],
        descriptors: usize,
        last: &[u8],
    ) -> Result<Vec<(BlockName, OwnedFd)>, CprError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpr");
        let listener = CprListener::bind(&path, &StreamOptions::default()).unwrap();
        let mut qemu = UnixStream::connect(&path).unwrap();
        qemu.write_all(b"QCPR\0\0\0\x01").unwrap();
        for (index, name) in names.iter().enumerate() {
            let length = (name.len() as u32 + 1).to_be_bytes();
            qemu.write_all(&[&[1][..], &length, name.as_bytes(), b"\0\0\0\0\0"].concat()).unwrap();
            let memory = Mapping::memfd(name, 4096 << index).unwrap();
            match index < descriptors {
                true => drop(send_with_descriptor(qemu.as_fd(), b" ", memory.backing().unwrap().0).unwrap()),
                false => qemu.write_all(b" ").unwrap(),
            }
        }
        qemu.write_all(last).unwrap();
        drop(qemu);
        let memory = listener.accept(&Stop::never())?;
        Ok(memory.hang_up())
    }

    #[test]
    fn descriptors_come_with_their_names() {
        let came = passed(&["pc.bios", "r0"], 2, &[0]).unwrap();
        let sizes = came.iter().map(|(name, fd)| (name.as_str(), rustix::fs::fstat(fd).unwrap().st_size));
        assert_eq!(sizes.collect::<Vec<_>>(), [("pc.bios", 4096), ("r0", 8192)]);
    }

    #[test]
    fn fewer_descriptors_than_names_and_what_is_no_list_are_refused() {
        let refused =
            |names: &[&str], descriptors, last: &[u8]| passed(names, descriptors, last).unwrap_err();
        assert!(matches!(refused(&["a", "b"], 1, &[0]), CprError::Descriptors { names: 2, came: 1 }));
        assert!(matches!(refused(&["a", "b"], 2, &[]), CprError::State(CprStateError::Truncated { .. })));
        assert!(matches!(refused(&["a"], 1, &[7]), CprError::State(CprStateError::Malformed { .. })));
        let long = vec![1; MAX_CPR_STATE];
        assert!(matches!(refused(&["a"], 1, &long), CprError::Long));
    }
}
