//! A network outage after COMMIT.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use super::{Machine, guest};
use crate::engine::{Ending, Outcome};
use crate::guest::{DeviceState, GuestControl};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::transport::{StreamChannel, StreamOptions};

/// A destination's VM that is disconnected from the network while it starts.
struct CutOff(Machine, Vec<OwnedFd>);

impl GuestControl for CutOff {
    fn pause(&mut self) -> io::Result<()> {
        self.0.pause()
    }
    fn resume(&mut self) -> io::Result<()> {
        let drop_all = || socket2::SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
        for socket in &self.1 {
            socket2::SockRef::from(&socket.as_fd()).attach_filter(&[drop_all()])?;
        }
        // A kernel that had this timeout set waits for at least six seconds.
        std::thread::sleep(Duration::from_secs(8));
        for socket in &self.1 {
            socket2::SockRef::from(&socket.as_fd()).detach_filter()?;
        }
        self.0.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        self.0.devices()
    }
}

/// Before COMMIT both ends would have closed the connection after a second; after it only the finish timeout counts.
#[test]
fn an_outage_behind_commit_that_ends_within_the_finish_timeout_leaves_no_doubt() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let sockets = [&near, &far].map(|socket| OwnedFd::from(socket.try_clone().unwrap()));
    let options = StreamOptions { dead_peer: Duration::from_secs(1), ..StreamOptions::default() };
    let channel = |socket: TcpStream| StreamChannel::from_fd(socket.into(), "peer", &options).unwrap();
    let (memory, machine) = (guest(&[30]), Machine::running(b"devices"));
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    let connection = SourceConnection::over(channel(near), memory.clone());
    let source = SourceGuest { memory, dirty: Vec::new(), control: Box::new(machine.clone()) };
    let there = Machine::default();
    let control = Box::new(CutOff(there.clone(), Vec::from(sockets)));
    let provider = Box::new(guest(&[30]));
    let settings_there = DestinationSettings::default();
    let destination = DestinationSession::new(
        DestinationGuest { memory: provider, control },
        DestinationConnection::over(channel(far)),
        settings_there,
    );
    let destination = destination.spawn().unwrap();
    let sent = SourceSession::new(source, connection, settings).run();
    let arrived = destination.wait().unwrap();
    assert_eq!(
        (sent.outcome, arrived.ending),
        (Outcome::Completed, Ending::Running),
        "{:?} {:?}",
        sent.error,
        arrived.error
    );
    assert!(!machine.runs() && there.runs());
}
