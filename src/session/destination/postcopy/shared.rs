//! What the threads of a postcopy share, and the one that serves faults.

use super::*;

/// Between two checks whether the source's host has acknowledged an answer.
pub(in crate::session::destination) const ACK_CHECK_INTERVAL: Duration = Duration::from_micros(200);

/// Figures of the faults at missing pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MissingPages {
    /// Faults that were reported: threads that had to wait for a page.
    pub faults: u64,
    /// Requests that were sent for them.
    pub requests: u64,
    /// From the first fault at a page to the page in place.
    pub latency: LatencySummary,
    /// How long threads waited, and the vCPUs among them
    /// ([`DestinationSettings::vcpu_threads`](crate::session::DestinationSettings::vcpu_threads)).
    pub waits: PageWaits,
    /// Target pages that arrived on the source's connection for urgent pages (QEMU: postcopy-preempt).
    pub preempt_pages: u64,
    /// From the package's last byte until the guest was started.
    pub time_to_run: Duration,
}

/// What the threads of a postcopy share.
pub(in crate::session::destination) struct Shared {
    pub(in crate::session::destination) placer: Arc<Placer>,
    pub(in crate::session::destination) faults: Arc<MissingFaults>,
    pub(in crate::session::destination) pager: Arc<Mutex<Pager>>,
    pub(in crate::session::destination) vcpus: VcpuThreads,
    pub(in crate::session::destination) back: ReturnPathWriter,
    pub(in crate::session::destination) began: Instant,
    pub(in crate::session::destination) send_timeout: Duration,
    pub(in crate::session::destination) owner: Owner,
    /// A ramwire: it keeps its guest paused until it has our answer.
    pub(in crate::session::destination) native: bool,
    /// The answer by which the source hands over its guest was sent, on whichever connection.
    pub(in crate::session::destination) answered: AtomicBool,
    /// The device state could not be loaded, or the guest not started.
    pub(in crate::session::destination) load_failed: AtomicBool,
    /// The guest was not started only because it had been given up: the reason for that is the cause of all.
    pub(in crate::session::destination) gave_way: AtomicBool,
    /// Raised at the end of all.
    pub(in crate::session::destination) over: CancelToken,
    /// Raised when the present connection is of no more use.
    pub(in crate::session::destination) connection: Mutex<CancelToken>,
    pub(in crate::session::destination) failure: Mutex<Option<Error>>,
    pub(in crate::session::destination) statistics: SharedStatistics,
}

impl Shared {
    pub(in crate::session::destination) fn pager(&self) -> MutexGuard<'_, Pager> {
        self.pager.locked()
    }

    pub(in crate::session::destination) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// What no other connection mends.
    pub(in crate::session::destination) fn fail(&self, error: Error) {
        self.failure.locked().get_or_insert(error);
        self.lose_connection();
    }

    pub(in crate::session::destination) fn lose_connection(&self) {
        self.connection.locked().cancel();
    }

    /// Ends waits on the present connection.
    pub(in crate::session::destination) fn stop(&self) -> Stop {
        Stop::on(&self.connection.locked())
    }

    /// Waits until the source's host has the answer that makes the guest ours: without it that source resumes its
    /// guest.
    pub(in crate::session::destination) fn delivered(
        &self,
        value: u32,
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        let stop = stop.within(self.send_timeout);
        while value == PING_TAKEN
            && self.back.unacknowledged() > 0
            && stop.sleep(ACK_CHECK_INTERVAL).is_none()
        {}
        // A connection that was dropped has no bytes that are not acknowledged.
        match stop.reason().filter(|_| value == PING_TAKEN) {
            Some(reason) => {
                Err(ChannelError::Stopped { reason, doing: "waiting until the source has our answer" })
            }
            None => Ok(()),
        }
    }

    /// True if the device state could not be loaded, or the guest not started.
    pub(in crate::session::destination) fn load_has_failed(&self) -> bool {
        self.load_failed.load(Ordering::Acquire)
    }

    /// True if a loss does not end the migration; see [`Ownership::lost`].
    pub(in crate::session::destination) fn survives_disconnect(&self, another: bool) -> bool {
        !self.load_has_failed() && self.owner.step(|owner| owner.lost(another, !self.native))
    }

    /// A source that continues on another connection has not its guest: sends it the answer to the package again,
    /// which may have been lost. Before the device state is loaded there is none, and the guest is not ours.
    ///
    /// # Errors
    /// The connection is lost. The guest was given up.
    pub(in crate::session::destination) fn answer_again(&self, stop: &Stop) -> Result<(), Error> {
        if self.native && !self.answered.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.native {
            self.back.message(Message::Pong(PING_TAKEN), stop)?;
        }
        match self.owner.step(Ownership::proven) {
            true => Ok(()),
            false => Err(out_of_turn("RESUME", "a postcopy that was given up")),
        }
    }

    /// Another connection is there.
    pub(in crate::session::destination) fn reconnected(&self, back: Box<dyn ByteSink>) {
        *self.connection.locked() = CancelToken::default();
        self.back.replace(Some(back));
    }

    /// Where urgent pages go on the present connections.
    pub(in crate::session::destination) fn urgent_pages(self: &Arc<Self>) -> UrgentPages {
        let lost = Arc::clone(self);
        let lose = Arc::new(move |_| lost.lose_connection());
        UrgentPages { placer: Arc::clone(&self.placer), stop: self.stop(), lose }
    }

    /// True if another connection would be of no use.
    pub(in crate::session::destination) fn has_failed(&self) -> bool {
        self.failure.locked().is_some()
    }

    /// Serves faults until all is over.
    pub(in crate::session::destination) fn serve_faults(&self) {
        // Version of the list of vCPUs that the pager knows.
        let (stop, mut known) = (Stop::on(&self.over), 0);
        while let Ok(None) = stop.wait(self.faults.as_fd(), PollFlags::IN) {
            if let Err(error) = self.serve_all(&mut known) {
                self.fail(error);
                return;
            }
        }
    }

    pub(in crate::session::destination) fn serve_all(&self, known: &mut u64) -> Result<(), Error> {
        let reading = |source: io::Error| Error::Control { what: "read the faults of missing pages", source };
        while let Some(fault) = self.faults.next().map_err(reading)? {
            let Some(landing) = self.placer.host_page_at(fault.at) else { continue };
            let who = Waiter { thread: fault.thread, vcpu: self.vcpus.vcpu_of(fault.thread) };
            let answer = {
                let (mut pager, now) = (self.pager(), self.now());
                if let Some(vcpus) = self.vcpus.changed(known) {
                    pager.know(now, vcpus);
                }
                pager.fault(now, host_page(landing), who, || self.placer.has_all(landing))
            };
            match answer {
                FaultAnswer::Received => self.placer.answer_received(landing)?,
                FaultAnswer::Wait => {}
                FaultAnswer::Ask => self.ask(landing),
            }
        }
        Ok(())
    }

    /// A request that can't be sent stays outstanding: it is sent on the next connection. That one may be there by the
    /// time that the failure is noticed here, and must not be dropped.
    pub(in crate::session::destination) fn ask(&self, landing: Landing) {
        let connection = self.connection.locked().clone();
        let stop = Stop::on(&connection).within(self.send_timeout);
        if let Err(error) = self.back.ask(&self.placer, landing, &stop) {
            tracing::warn!(%error, "a missing page could not be asked for");
            connection.cancel();
        }
    }
}

fn host_page(landing: Landing) -> HostPage {
    HostPage { block: landing.block(), offset: landing.offset().0 }
}
