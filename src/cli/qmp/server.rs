//! The monitor's thread: accepts clients, reads their commands, sends them events.
//!
//! One thread has all clients. None of its calls waits for one of them, so a stalled client costs the others and the
//! migration nothing, and at most [`MAX_CLIENTS`] are served.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc::TryRecvError;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ramwire::observe::Events;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::super::output::note;
use super::client::{Client, Dropped};
use super::conversation::line;
use super::events::Translator;
use super::listener::Listener;
use super::subject::Subject;

/// Maximum number of clients at a time.
pub(super) const MAX_CLIENTS: usize = 16;

/// How long the end waits for clients to read the last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Rest after an accept that failed, as where no descriptor is left.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// The reply to a client above the limit.
const TOO_MANY: &str = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"this monitor has no room for a \
    client; end another one\"}}\r\n";

/// Serves until it is dropped; then clients have a short time to read the last lines.
pub(in crate::cli) struct Monitor {
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Serves `subject` to clients that connect to `listener`.
    ///
    /// # Errors
    /// No thread or no descriptor left.
    pub(super) fn start(listener: Listener, subject: Arc<Subject>) -> io::Result<Self> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let events = subject.statistics().events();
        events.descriptor()?;
        let ending = Arc::clone(&wake);
        let (translator, clients) = Default::default();
        let mut server = Server { listener, subject, events, has_told_all: false, translator, clients };
        let serve = move || server.serve(&ending);
        let thread = std::thread::Builder::new().name("ramwire-qmp".into()).spawn(serve)?;
        Ok(Self { wake, thread: Some(thread) })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // An eventfd that was never written takes any number.
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Server {
    listener: Listener,
    subject: Arc<Subject>,
    events: Events,
    /// Nothing happens any more.
    has_told_all: bool,
    translator: Translator,
    clients: Vec<Client>,
}

/// The descriptors that are ready.
struct Ready {
    ending: bool,
    stranger: bool,
    clients: Vec<PollFlags>,
}

impl Server {
    fn serve(&mut self, ending: &OwnedFd) {
        loop {
            let ready = match self.wait(Some(ending), None) {
                Ok(ready) => ready,
                Err(error) => return note!("ramwire: the monitor ends: {error}"),
            };
            // This comes first: a client that is sent an event may be dropped by that, and another one takes its place
            // in the list.
            self.serve_clients(&ready.clients);
            self.tell_events();
            if ready.ending {
                break;
            }
            if ready.stranger {
                self.accept();
            }
        }
        self.tell_events();
        let by = Instant::now() + LAST_LINES;
        while !self.clients.iter().all(Client::has_read_all) && Instant::now() < by {
            let Ok(ready) = self.wait(None, Some(by.saturating_duration_since(Instant::now()))) else {
                break;
            };
            self.serve_clients(&ready.clients);
        }
    }

    /// Waits until something is ready: with `ending`, for that, strangers and events as well.
    fn wait(&self, ending: Option<&OwnedFd>, time: Option<Duration>) -> io::Result<Ready> {
        let mut polled = Vec::with_capacity(3 + self.clients.len());
        let listener = self.listener.socket();
        // After the last event its descriptor stays readable.
        let events = if self.has_told_all { None } else { Some(self.events.descriptor()?) };
        if let Some(ending) = ending {
            polled.push(PollFd::new(ending, PollFlags::IN));
            polled.push(PollFd::new(&listener, PollFlags::IN));
            polled.extend(events.as_ref().map(|events| PollFd::new(events, PollFlags::IN)));
        }
        let first = polled.len();
        polled.extend(self.clients.iter().map(|client| PollFd::new(client, client.wants())));
        let time = time.and_then(|time| Timespec::try_from(time).ok());
        match poll(&mut polled, time.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let is_ready = |at: usize| ending.is_some() && !polled[at].revents().is_empty();
        Ok(Ready {
            ending: is_ready(0),
            stranger: is_ready(1),
            clients: polled[first..].iter().map(PollFd::revents).collect(),
        })
    }

    fn serve_clients(&mut self, ready: &[PollFlags]) {
        let mut ready = ready.iter();
        let subject = &self.subject;
        self.clients.retain_mut(|client| {
            let ready = ready.next().copied().unwrap_or(PollFlags::empty());
            client.serve(ready, subject).unwrap_or_else(|why| is_dropped(client, &why))
        });
    }

    fn tell_events(&mut self) {
        let holds = self.subject.plan().has("pause-before-switchover");
        loop {
            let event = match self.events.try_recv() {
                Ok(event) => event,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.has_told_all = true;
                    return;
                }
            };
            for told in self.translator.translate(&event, holds) {
                let told = line(&told);
                self.clients.retain_mut(|client| match client.tell(&told) {
                    Ok(()) => true,
                    Err(why) => is_dropped(client, &why),
                });
            }
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            Ok(None) => {}
            Ok(Some((socket, name))) if self.clients.len() < MAX_CLIENTS => {
                self.clients.push(Client::new(socket, name));
            }
            Ok(Some((socket, name))) => {
                // Its queue is empty: what does not fit now never will.
                let _ = rustix::io::write(&socket, TOO_MANY.as_bytes());
                note!("ramwire: {name} was refused by the monitor: it has {MAX_CLIENTS} clients");
            }
            Err(error) => {
                note!("ramwire: a client of the monitor could not be accepted: {error}");
                std::thread::sleep(RETRY_INTERVAL);
            }
        }
    }
}

fn is_dropped(client: &Client, why: &Dropped) -> bool {
    if why.is_disconnect() {
        return false;
    }
    note!("ramwire: {} was dropped by the monitor: {why}", client.name);
    false
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};

    use ramwire::observe::{SharedStatistics, Status};
    use ramwire::session::CancelReply;

    use super::super::listener::Place;
    use super::super::{Plan, Role};
    use super::*;

    struct Bed {
        dir: tempfile::TempDir,
        statistics: SharedStatistics,
        monitor: Option<Monitor>,
    }

    impl Bed {
        fn new() -> Self {
            let (dir, statistics) = (tempfile::tempdir().unwrap(), SharedStatistics::default());
            let cancels = || CancelReply::Accepted;
            let subject = Subject::new(Role::Source, statistics.clone(), Plan::default(), cancels);
            let listener = Listener::at(&Place::Unix(path(dir.path()))).unwrap();
            let monitor = Some(Monitor::start(listener, Arc::new(subject)).unwrap());
            Self { dir, statistics, monitor }
        }

        /// A client that has been greeted.
        fn connect(&self) -> BufReader<UnixStream> {
            let stream = UnixStream::connect(path(self.dir.path())).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let mut client = BufReader::new(stream);
            assert!(line_of(&mut client).contains("QMP"));
            client
        }

        fn negotiated(&self) -> BufReader<UnixStream> {
            let mut client = self.connect();
            assert!(ask(&mut client, "{\"execute\": \"qmp_capabilities\"}").contains("return"));
            client
        }
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join("monitor")
    }

    fn line_of(client: &mut BufReader<UnixStream>) -> String {
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        line
    }

    fn ask(client: &mut BufReader<UnixStream>, text: &str) -> String {
        client.get_mut().write_all(text.as_bytes()).unwrap();
        line_of(client)
    }

    #[test]
    fn the_last_lines_reach_a_client_and_the_path_goes() {
        let mut bed = Bed::new();
        let mut client = bed.negotiated();
        let mut deaf = bed.connect();
        bed.statistics.update(|now| (now.status, now.ended) = (Status::Completed, true));
        bed.monitor = None;
        let mut rest = String::new();
        client.read_to_string(&mut rest).unwrap();
        assert!(rest.lines().count() == 1 && rest.contains("completed"), "{rest}");
        assert_eq!(deaf.read_to_string(&mut String::new()).unwrap(), 0, "it has not negotiated");
        assert!(!path(bed.dir.path()).exists());
    }

    #[test]
    fn a_client_that_does_not_read_is_dropped_and_the_others_are_served() {
        let bed = Bed::new();
        let (mut stalled, mut reads) = (bed.negotiated(), bed.negotiated());
        let mut told = 0;
        // Its socket takes some, and 1 MiB waits for it; an event has some 100 bytes.
        while told < 200_000 {
            for status in [Status::Setup, Status::Active] {
                bed.statistics.update(|now| now.status = status);
                assert!(line_of(&mut reads).contains("MIGRATION"), "event {told}");
                told += 1;
            }
            if told % 1000 == 0 && stalled.get_mut().write_all(b" ").is_err() {
                break;
            }
        }
        assert!(told < 200_000, "it is still there");
        assert!(ask(&mut reads, "{\"execute\": \"query-status\"}").contains("paused"));
    }

    /// A client that sends commands without end and reads no answer is not served until it reads.
    #[test]
    fn commands_of_a_client_that_does_not_read_are_not_done() {
        let bed = Bed::new();
        let (mut floods, mut other) = (bed.negotiated(), bed.negotiated());
        floods.get_mut().set_write_timeout(Some(Duration::from_millis(200))).unwrap();
        let ask_much = "{\"execute\": \"query-qmp-schema\"}".repeat(100);
        let mut asked = 0;
        while asked < 100_000 && floods.get_mut().write_all(ask_much.as_bytes()).is_ok() {
            asked += 100;
        }
        assert!(asked < 100_000, "all was read");
        assert!(ask(&mut other, "{\"execute\": \"query-status\"}").contains("paused"));
        assert!(line_of(&mut floods).contains("MigrationCapability"));
    }

    /// More answers than may wait, to commands that arrived at once.
    #[test]
    fn a_client_that_reads_gets_all_answers_however_many_it_asked_for() {
        const ASKED: usize = 400;
        let bed = Bed::new();
        let mut client = bed.negotiated();
        let text = "{\"execute\": \"query-qmp-schema\"}".repeat(ASKED);
        client.get_mut().write_all(text.as_bytes()).unwrap();
        assert!((0..ASKED).all(|_| line_of(&mut client).contains("MigrationCapability")));
    }

    #[test]
    fn one_client_too_many_is_told_so_and_a_place_is_free_again() {
        let bed = Bed::new();
        let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| bed.connect()).collect();
        let mut refused = BufReader::new(UnixStream::connect(path(bed.dir.path())).unwrap());
        let said = line_of(&mut refused);
        assert!(said.contains("no room for a client"), "{said}");
        assert_eq!(refused.read_to_string(&mut String::new()).unwrap(), 0);
        drop(clients.pop());
        let by = Instant::now() + Duration::from_secs(60);
        loop {
            let mut next = BufReader::new(UnixStream::connect(path(bed.dir.path())).unwrap());
            if line_of(&mut next).contains("QMP") {
                break;
            }
            assert!(Instant::now() < by, "no place becomes free");
        }
    }

    /// As `printf .. | socat - UNIX:..` does it.
    #[test]
    fn a_client_that_has_said_all_gets_its_answers() {
        let bed = Bed::new();
        let mut client = bed.connect();
        let text = "{\"execute\": \"qmp_capabilities\"}\n{\"execute\": \"query-migrate\"}";
        client.get_mut().write_all(text.as_bytes()).unwrap();
        client.get_mut().shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = String::new();
        client.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "{\"return\":{}}\r\n{\"return\":{}}\r\n");
    }
}
