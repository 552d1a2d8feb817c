//! The guest's callbacks, on a thread of their own: each may write to guest memory, or wait for a thread that does, while the
//! session's thread serves those writes.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam::channel::{Receiver, Sender, TryRecvError, bounded, unbounded};

use crate::guest::{GuestControl, save_state};
use crate::session::callback::{guarded, quietly};
use crate::session::workers::Spawner;
use crate::session::{Error, Framing};
use crate::stream::qemu::own_devices::tail_of;
use crate::sys::WakeEvent;
use crate::units::PageSize;

/// The thread's name.
const NAME: &str = "ramwire-snap-vm";

/// The calls to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Pause,
    SaveState,
    Resume,
}

/// A call that is over.
pub(super) struct Answer {
    pub(super) call: Call,
    /// With the bytes of a saved state.
    pub(super) done: Result<Vec<u8>, Error>,
    pub(super) began: Instant,
    pub(super) ended: Instant,
}

enum Order {
    Call(Call),
    /// To be promised no longer.
    AllowDiscards,
}

/// The thread, as the session sees it.
pub(super) struct Callbacks {
    orders: Sender<Order>,
    promised: Receiver<Result<bool, Error>>,
    answers: Receiver<Answer>,
    /// The current call, and when it began.
    at: Option<(Call, Instant)>,
    thread: JoinHandle<()>,
}

impl Callbacks {
    /// Starts the thread, which begins with the promise to keep the guest's memory; `wake` is raised with each answer. The
    /// shape is that of the stream that the device state goes into.
    ///
    /// # Errors
    /// [`Error::Thread`]: nothing was called.
    pub(super) fn start(
        control: Box<dyn GuestControl>,
        shape: (PageSize, Framing),
        spawner: &Spawner,
        wake: Arc<WakeEvent>,
    ) -> Result<Self, Error> {
        let (orders, work) = unbounded();
        let (promise, promised) = bounded(1);
        let (answer, answers) = unbounded();
        let job = move || serve(control, shape, &work, &promise, &answer, &wake);
        let thread = spawner.spawn(NAME, Box::new(job))?;
        Ok(Self { orders, promised, answers, at: None, thread })
    }

    /// Whether the guest keeps its memory. Waits for it.
    pub(super) fn keep_memory(&self) -> Result<bool, Error> {
        self.promised.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Begins a call, one at a time.
    pub(super) fn begin(&mut self, call: Call) -> Result<(), Error> {
        self.orders.send(Order::Call(call)).map_err(|_| gone())?;
        self.at = Some((call, Instant::now()));
        Ok(())
    }

    /// The call that is over, without waiting.
    pub(super) fn next(&mut self) -> Option<Answer> {
        match self.answers.try_recv() {
            Ok(answer) => {
                self.at = None;
                Some(answer)
            }
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => {
                let (call, began) = self.at.take()?;
                Some(Answer { call, done: Err(gone()), began, ended: Instant::now() })
            }
        }
    }

    /// After the calls that were begun.
    pub(super) fn allow_discards(&self) {
        // A thread that has ended promises nothing.
        let _ = self.orders.send(Order::AllowDiscards);
    }

    /// Waits for the end of the calls that were begun. Nothing is protected.
    pub(super) fn end(self) {
        let Self { orders, thread, .. } = self;
        drop(orders);
        // Panics of callbacks were answers.
        let _ = thread.join();
    }
}

fn gone() -> Error {
    Error::Thread { name: NAME, source: std::io::Error::other("it has ended") }
}

fn serve(
    mut control: Box<dyn GuestControl>,
    shape: (PageSize, Framing),
    work: &Receiver<Order>,
    promise: &Sender<Result<bool, Error>>,
    answer: &Sender<Answer>,
    wake: &WakeEvent,
) {
    let keeps = guarded("calling GuestControl::forbid_discard", || control.forbid_discard(true));
    // If the session is gone, the result has no receiver; the orders end then.
    let _ = promise.send(keeps);
    while let Ok(order) = work.recv() {
        match order {
            Order::AllowDiscards => quietly("allowing discards", || _ = control.forbid_discard(false)),
            Order::Call(call) => {
                let began = Instant::now();
                let done = perform(&mut *control, call, shape);
                let _ = answer.send(Answer { call, done, began, ended: Instant::now() });
                wake.raise();
            }
        }
    }
}

fn perform(
    control: &mut dyn GuestControl,
    call: Call,
    (page, framing): (PageSize, Framing),
) -> Result<Vec<u8>, Error> {
    let (during, what) = match call {
        Call::Pause => ("calling GuestControl::pause", "pause"),
        Call::SaveState => ("calling DeviceState::save", "save its device state"),
        Call::Resume => ("calling GuestControl::resume", "resume"),
    };
    let done = guarded(during, || match call {
        Call::Pause => control.pause().map(|()| Vec::new()),
        Call::SaveState => save_state(control).map(|saved| tail_of(saved, page.bytes(), framing)),
        Call::Resume => control.resume().map(|()| Vec::new()),
    })?;
    done.map_err(|source| Error::Control { what, source })
}
