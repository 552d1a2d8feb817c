//! The channel on which memory is passed to or by a QEMU in mode cpr-transfer, ahead of its migration.
//!
//! The source stops its guest, sends the names of descriptors and the descriptors, and waits until the destination
//! closes the connection. Then it connects for the migration itself, in which no page is sent. Either end may be a
//! QEMU, or both may be ramwires.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::PollFlags;

use super::open::{Listening, retry_until_listening};
use super::stream::unix::UnixListener;
use crate::error::Chain;
use crate::ram::BlockName;
use crate::stream::qemu::cpr::{
    CPR_BEGIN, CprStateError, MAX_CPR_STATE, WITH_DESCRIPTOR, decode_cpr_state, encode_cpr_state,
};
use crate::sys::{RecvPart, SendPart, SharedFile, Stop};
use crate::transport::{
    Address, ByteSink, ByteSource, ChannelError, OpenError, StreamChannel, StreamOptions, connect,
};

/// Why memory was not passed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CprError {
    /// The connection.
    #[error("the cpr channel")]
    Channel(#[from] ChannelError),
    /// The received bytes are no list of descriptors.
    #[error("invalid data on the cpr channel")]
    State(#[from] CprStateError),
    /// It is longer than any guest's.
    #[error(
        "more than {MAX_CPR_STATE} bytes arrived on the cpr channel; is it the connection of the migration \
        itself?"
    )]
    Long,
    /// Descriptors are missing, or there are more.
    #[error("{names} descriptors were announced on the cpr channel, and {arrived} arrived")]
    Descriptors {
        /// Number of names that arrived.
        names: usize,
        /// Number of descriptors that arrived.
        arrived: usize,
    },
    /// The other end of the channel sends something itself.
    #[error(
        "the peer answered on the cpr channel, which a QEMU does not: see that it is the address of type cpr"
    )]
    Answered,
}

/// Listens for the channel.
#[derive(Debug)]
pub struct CprListener {
    listening: UnixListener,
    options: StreamOptions,
    strangers: Strangers,
}

/// Told of connections that were closed.
struct Strangers(Box<dyn Fn(&str) + Send + Sync>);

impl std::fmt::Debug for Strangers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Strangers").finish_non_exhaustive()
    }
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
        let listening = UnixListener::bind(path)?;
        let strangers = Strangers(Box::new(|why| tracing::warn!(why, "a stranger on the cpr channel")));
        Ok(Self { listening, options: *options, strangers })
    }

    /// Makes it call `tell` for each connection that was closed because no QEMU began to pass memory on it.
    pub fn on_stranger(&mut self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.strangers = Strangers(Box::new(tell));
    }

    /// Waits for a QEMU and reads what it passes. A connection that does not begin so is closed, and listening goes on.
    ///
    /// # Errors
    /// [`CprError`].
    pub fn accept(self, stop: &Stop) -> Result<CprMemory, CprError> {
        loop {
            let channel = self.next(stop)?;
            let mut begun = false;
            match read_memory(channel, &mut begun, stop) {
                Err(error) if !begun && stop.reason().is_none() => {
                    let why = Chain(&error);
                    (self.strangers.0)(&format!(
                        "closed a connection that passed no memory ({why}); listening goes on"
                    ));
                }
                done => return done,
            }
        }
    }

    /// The next connection.
    fn next(&self, stop: &Stop) -> Result<StreamChannel, CprError> {
        const WAITING: &str = "waiting for a QEMU on the cpr channel";
        loop {
            for socket in self.listening.sockets() {
                let waited = stop.wait(socket.as_fd(), PollFlags::IN).map_err(|source| ChannelError::Io {
                    peer: self.listening.place(),
                    doing: WAITING,
                    source,
                })?;
                if let Some(reason) = waited {
                    return Err(ChannelError::Stopped { reason, doing: WAITING }.into());
                }
            }
            if let Some(channel) = self.listening.take(&self.options)? {
                return Ok(channel);
            }
        }
    }
}

/// Reads what a QEMU passes. `begun`: it has begun as a QEMU's.
fn read_memory(mut channel: StreamChannel, begun: &mut bool, stop: &Stop) -> Result<CprMemory, CprError> {
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
        if bytes.len() >= CPR_BEGIN.len() && !*begun {
            if !bytes.starts_with(&CPR_BEGIN) {
                return Err(CprStateError::NoState.into());
            }
            *begun = true;
        }
        if bytes.len() > MAX_CPR_STATE || descriptors.len() > bytes.len() {
            return Err(CprError::Long);
        }
    }
    let names = decode_cpr_state(&bytes)?;
    if names.len() != descriptors.len() {
        return Err(CprError::Descriptors { names: names.len(), arrived: descriptors.len() });
    }
    Ok(CprMemory { _channel: channel, memory: names.into_iter().zip(descriptors).collect() })
}

impl CprMemory {
    /// Closes the connection: the QEMU connects for its migration now, and a listener must exist. Returns the memory,
    /// by its blocks.
    pub fn hang_up(self) -> Vec<(BlockName, OwnedFd)> {
        self.memory
    }
}

/// The channel to a QEMU that waits for the memory of its guest.
#[derive(Debug)]
pub struct CprSender {
    channel: StreamChannel,
}

impl CprSender {
    /// Connects to `path`; tries again for at most `retry` while nobody listens there.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn connect(
        path: &Path,
        options: &StreamOptions,
        retry: Duration,
        stop: &Stop,
    ) -> Result<Self, OpenError> {
        let address = Address::unix(path.to_owned());
        let channel = retry_until_listening(&address, retry, stop, || connect(&address, options, stop))?;
        Ok(Self { channel })
    }

    /// Passes memory by its RAM blocks, and waits until the peer has taken it and listens for the migration. A QEMU
    /// takes its time: it makes its whole machine meanwhile.
    ///
    /// The peer maps the memory from here on, and its guest runs in it once the migration has completed.
    ///
    /// # Errors
    /// [`CprError`]. A peer that ended can't be told from one that has taken the memory: nobody listens for the
    /// migration then.
    pub fn pass(mut self, memory: &[(BlockName, SharedFile)], stop: &Stop) -> Result<(), CprError> {
        let parts = encode_cpr_state(memory.iter().map(|(name, _)| name));
        let mut descriptors = memory.iter().map(|(_, file)| file.descriptor());
        for part in &parts {
            self.channel.send(&[SendPart::Own(part)], stop)?;
            if let Some(descriptor) = descriptors.next() {
                self.channel.send_descriptor(&[WITH_DESCRIPTOR], descriptor, stop)?;
            }
        }
        self.channel.finish(stop)?;
        self.channel.set_stall(None);
        match self.channel.recv(&mut [RecvPart::Own(&mut [0])], stop)? {
            0 => Ok(()),
            _ => Err(CprError::Answered),
        }
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
    fn what_is_sent_arrives_and_the_sender_waits_for_the_hang_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpr");
        let options = StreamOptions::default();
        let memory: Vec<_> = ["pc.bios", "r0"]
            .map(|name| {
                let file = Mapping::memfd(name, 8192).unwrap().region().shared_file().unwrap();
                (BlockName::new(name).unwrap(), file)
            })
            .into();
        let sent = memory.clone();
        let to = path.clone();
        let sender = std::thread::spawn(move || {
            // Nobody listens yet.
            let sender = CprSender::connect(&to, &options, Duration::from_secs(600), &Stop::never()).unwrap();
            sender.pass(&sent, &Stop::never())
        });
        let came = CprListener::bind(&path, &options).unwrap().accept(&Stop::never()).unwrap();
        assert!(!sender.is_finished(), "it has not been hung up on");
        for ((name, descriptor), (due, file)) in came.hang_up().into_iter().zip(&memory) {
            let descriptor = SharedFile::checked(descriptor, 0, 8192).unwrap();
            assert!(name == *due && descriptor.is_same(file));
        }
        sender.join().unwrap().unwrap();
    }

    #[test]
    fn a_peer_that_answers_or_listens_nowhere_is_no_qemu() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpr");
        let sender = || CprSender::connect(&path, &StreamOptions::default(), Duration::ZERO, &Stop::never());
        assert!(matches!(sender(), Err(OpenError::Channel(ChannelError::Io { .. }))));
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let sender = sender().unwrap();
        let mut peer = listener.accept().unwrap().0;
        peer.write_all(b"QEVM").unwrap();
        assert!(matches!(sender.pass(&[], &Stop::never()), Err(CprError::Answered)));
    }

    #[test]
    fn a_connection_that_passes_nothing_is_closed_and_the_next_one_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cpr");
        let mut listener = CprListener::bind(&path, &StreamOptions::default()).unwrap();
        let (tell, told) = std::sync::mpsc::channel();
        let tell = std::sync::Mutex::new(tell);
        listener.on_stranger(move |why| tell.lock().unwrap().send(why.to_owned()).unwrap());
        drop(UnixStream::connect(&path).unwrap());
        UnixStream::connect(&path).unwrap().write_all(b"GET / HTTP/1.0\r\n").unwrap();
        let mut qemu = UnixStream::connect(&path).unwrap();
        qemu.write_all(b"QCPR\0\0\0\x01\0").unwrap();
        qemu.shutdown(std::net::Shutdown::Write).unwrap();
        let memory = listener.accept(&Stop::never()).unwrap();
        assert!(memory.hang_up().is_empty());
        let strangers: Vec<_> = told.try_iter().collect();
        assert!(strangers.len() == 2 && strangers.iter().all(|why| why.contains("listening goes on")));
    }

    #[test]
    fn fewer_descriptors_than_names_and_what_is_no_list_are_refused() {
        let refused =
            |names: &[&str], descriptors, last: &[u8]| passed(names, descriptors, last).unwrap_err();
        assert!(matches!(refused(&["a", "b"], 1, &[0]), CprError::Descriptors { names: 2, arrived: 1 }));
        assert!(matches!(refused(&["a", "b"], 2, &[]), CprError::State(CprStateError::Truncated { .. })));
        assert!(matches!(refused(&["a"], 1, &[7]), CprError::State(CprStateError::Malformed { .. })));
        let long = vec![1; MAX_CPR_STATE];
        assert!(matches!(refused(&["a"], 1, &long), CprError::Long));
    }
}
