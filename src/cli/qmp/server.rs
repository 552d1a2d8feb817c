//! The monitor's thread: takes clients, reads what they say, tells them what happens.
//!
//! One thread has all clients. None of its calls waits for one of them, so a client that stands still costs the others
//! and the migration nothing, and at most [`MAX_CLIENTS`] are served.

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

/// Most clients at a time.
pub(super) const MAX_CLIENTS: usize = 16;

/// How long the end waits for clients to read the last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Rest after an accept that failed, as where no descriptor is left.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// What a client is told that is one too many.
const TOO_MANY: &str = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"this monitor has no place left; end another \
                        client\"}}\r\n";

/// Serves until it is dropped; then clients have a moment to read the last lines.
pub(in crate::cli) struct Monitor {
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Serves `subject` to those who connect to `listener`.
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

/// What is ready.
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
            self.tell_events();
            self.go_on(&ready.clients);
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
            self.go_on(&ready.clients);
        }
    }

    /// Waits until something is ready: with `ending`, for that, strangers and events as well.
    fn wait(&self, ending: Option<&OwnedFd>, time: Option<Duration>) -> io::Result<Ready> {
        let mut polled = Vec::with_capacity(3 + self.clients.len());
        let listener = self.listener.socket();
        // Behind the last one its descriptor is readable for good.
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

    fn go_on(&mut self, ready: &[PollFlags]) {
        let mut ready = ready.iter();
        let subject = &self.subject;
        self.clients.retain_mut(|client| {
            let ready = ready.next().copied().unwrap_or(PollFlags::empty());
            client.go_on(ready, subject).unwrap_or_else(|why| is_dropped(client, &why))
        });
    }

    fn tell_events(&mut self) {
        loop {
            let event = match self.events.try_recv() {
                Ok(event) => event,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.has_told_all = true;
                    return;
                }
            };
            let Some(told) = self.translator.translate(&event) else { continue };
            let told = line(&told);
            self.clients.retain_mut(|client| match client.tell(&told) {
                Ok(()) => true,
                Err(why) => is_dropped(client, &why),
            });
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
                note!("ramwire: a client of the monitor could not be taken: {error}");
                std::thread::sleep(RETRY_INTERVAL);
            }
        }
    }
}

fn is_dropped(client: &Client, why: &Dropped) -> bool {
    note!("ramwire: {} was dropped by the monitor: {why}", client.name);
    false
}
