//! Settings that may be changed while a migration runs.
//!
//! A session's settings determine how it begins. Everything that may change later is in one [`Control`]. The session
//! reads its parts where they take effect: the limit at each batch, the cache at each round, the rest once a slice and
//! before each sync.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::engine::{BandwidthLimit, ThrottlePolicy};
use crate::error::Remedy;
use crate::sys::Lock as _;
use crate::transport::{Address, DeltaCacheSize};
use crate::units::Rate;

use super::Error;
use super::config::SourceSettings;
use super::connection::ConnectionHandle;
use super::handle::{CancelReply, Canceller};

/// Changes a migration while it runs, from any thread; clones change the same one. No method waits for the migration,
/// and none has an effect after it has ended.
///
/// [`SourceSession::control`](super::SourceSession::control) returns it before the start,
/// [`MigrationHandle::control`](super::MigrationHandle::control) while it runs.
#[derive(Clone, Debug)]
pub struct Control {
    canceller: Canceller,
    bandwidth: BandwidthLimit,
    postcopy_bandwidth: BandwidthLimit,
    delta_cache: Option<DeltaCacheSize>,
    gate: SwitchoverGate,
    connection: ConnectionHandle,
    limits: Arc<Mutex<Limits>>,
}

/// The values that the session reads once a slice.
#[derive(Clone, Copy, Debug)]
struct Limits {
    downtime: Duration,
    throttling: Option<ThrottlePolicy>,
    postcopy: Postcopy,
    guest: Throttleable,
}

/// Whether the guest is to run at the destination before all its memory has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Postcopy {
    /// Postcopy was not announced to the destination.
    NotAnnounced,
    Announced,
    Wanted,
}

/// Which throttling is possible.
#[derive(Clone, Copy, Debug)]
struct Throttleable {
    /// It runs at its own source, upstream of a relay.
    elsewhere: bool,
    /// Its VMM reports how much each vCPU writes; `None` before it was queried.
    counts_vcpus: Option<bool>,
}

impl Control {
    /// Begins with `settings`; `delta_cache` is that of the connection.
    pub(super) fn new(settings: &SourceSettings, delta_cache: Option<DeltaCacheSize>) -> Self {
        let limits = Limits {
            downtime: settings.downtime_limit,
            throttling: settings.throttling,
            postcopy: settings.postcopy.as_ref().map_or(Postcopy::NotAnnounced, |_| Postcopy::Announced),
            guest: Throttleable { elsewhere: false, counts_vcpus: None },
        };
        let limit = |rate: Option<Rate>| BandwidthLimit::new(rate.map_or(0, |rate| rate.0));
        Self {
            canceller: Canceller::default(),
            bandwidth: limit(settings.max_bandwidth),
            postcopy_bandwidth: limit(settings.postcopy.as_ref().and_then(|postcopy| postcopy.max_bandwidth)),
            delta_cache,
            gate: SwitchoverGate::default(),
            connection: ConnectionHandle::default(),
            limits: Arc::new(Mutex::new(limits)),
        }
    }

    /// Requests the end. Never blocks for long; the reply is final.
    pub fn cancel(&self) -> CancelReply {
        self.canceller.cancel()
    }

    /// A part of it that can only cancel.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Maximum number of bytes a second while the guest runs, from the next batch of pages on; `None` is no limit. The
    /// last round, while the guest is paused, has none.
    pub fn set_max_bandwidth(&self, limit: Option<Rate>) {
        self.bandwidth.set(limit.map_or(0, |rate| rate.0));
    }

    /// The bandwidth limit.
    pub fn max_bandwidth(&self) -> Option<Rate> {
        self.bandwidth.get()
    }

    /// Maximum number of bytes a second after a switch to postcopy (QEMU's `max-postcopy-bandwidth`), from the next
    /// batch on. Requested pages are always sent immediately.
    pub fn set_postcopy_bandwidth(&self, limit: Option<Rate>) {
        self.postcopy_bandwidth.set(limit.map_or(0, |rate| rate.0));
    }

    /// Requests the switch to postcopy (QEMU's `migrate-start-postcopy`): the guest is paused as soon as the current
    /// batch of pages is sent, however many pages are dirty, unless it is already paused.
    ///
    /// # Errors
    /// [`Error::Config`]: postcopy was not announced to the destination.
    pub fn start_postcopy(&self) -> Result<(), Error> {
        let mut limits = self.limits();
        if limits.postcopy == Postcopy::NotAnnounced {
            return Err(Error::Config {
                what: "a switch to postcopy was not announced to the destination".into(),
                remedy: Remedy::Advice("start it with SourceSettings::postcopy"),
            });
        }
        limits.postcopy = Postcopy::Wanted;
        Ok(())
    }

    /// Closes the connection of a migration that has switched to postcopy (QEMU's `migrate-pause`), in any step. The
    /// guest continues at the destination; a thread that touches a missing page waits. No page is lost, until
    /// [`recover`](Self::recover) or the [time](super::PostcopySettings::reconnect_timeout) for it ends the wait.
    ///
    /// # Errors
    /// [`Error::Config`]: the guest was not handed over yet, or the migration has ended.
    pub fn pause(&self) -> Result<(), Error> {
        self.connection.pause()
    }

    /// Continues over another connection to `address` (QEMU's `migrate` with `resume`), where the destination of this
    /// migration listens again: after a loss, after a [`pause`](Self::pause), or in place of a working connection. An
    /// unreachable address is retried until another one is given, for at most
    /// [`reconnect_timeout`](super::PostcopySettings::reconnect_timeout).
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn recover(&self, address: Address) -> Result<(), Error> {
        self.connection.recover(address)
    }

    /// Longest permitted downtime. From the end of the current round on it decides whether the guest is paused; it has
    /// no effect once the guest is paused.
    pub fn set_downtime_limit(&self, limit: Duration) {
        self.limits().downtime = limit;
    }

    /// The longest permitted downtime.
    pub fn downtime_limit(&self) -> Duration {
        self.limits().downtime
    }

    /// Sets the throttling from now on: within 50 ms while pages are sent. If the method changes, the previous
    /// throttling ends first. Auto-converge with other figures continues from the share that it has reached, and is
    /// reduced to a smaller `max`.
    ///
    /// # Errors
    /// [`Error::Config`] if this throttling is not possible; nothing has changed.
    pub fn set_throttling(&self, throttling: Option<ThrottlePolicy>) -> Result<(), Error> {
        let mut limits = self.limits();
        limits.guest.check(throttling)?;
        limits.throttling = throttling;
        Ok(())
    }

    /// The throttling.
    pub fn throttling(&self) -> Option<ThrottlePolicy> {
        self.limits().throttling
    }

    /// Bytes of the cache of sent pages (QEMU's `xbzrle-cache-size`), from the next round on; 0: no page is sent as a
    /// difference. Copies that still fit stay in it. The last round changes nothing.
    ///
    /// # Errors
    /// [`Error::Config`]: pages are sent by page channels, by RDMA, or by a link of the caller's without a cache.
    pub fn set_delta_cache(&self, bytes: u64) -> Result<(), Error> {
        let Some(size) = &self.delta_cache else {
            return Err(Error::Config {
                what: "no cache of sent pages: over this connection pages do not travel as differences"
                    .into(),
                remedy: Remedy::Advice("they do in the stream of a tcp:, unix:, fd:, exec: or file: address"),
            });
        };
        size.set(bytes);
        Ok(())
    }

    /// Size of the cache of sent pages in bytes; `None` if there can be none.
    pub fn delta_cache(&self) -> Option<u64> {
        self.delta_cache.as_ref().map(DeltaCacheSize::get)
    }

    /// Continues a migration that waits with its paused guest
    /// ([`pause_before_switchover`](SourceSettings::pause_before_switchover)); may be called before the guest is paused
    /// (QEMU's `migrate-continue`). It counts for one pause: where the connection is lost after it and the guest runs on,
    /// the next pause waits again.
    pub fn continue_switchover(&self) {
        self.gate.open();
    }

    /// The guest runs elsewhere and can't be throttled from here.
    pub(super) fn guest_is_elsewhere(&self) {
        self.limits().guest.elsewhere = true;
    }

    /// Sets whether the VMM reports how much each vCPU writes.
    ///
    /// # Errors
    /// [`Error::Config`]: the throttling set so far is then not possible.
    pub(super) fn guest_counts_vcpus(&self, counts: bool) -> Result<(), Error> {
        let mut limits = self.limits();
        limits.guest.counts_vcpus = Some(counts);
        limits.guest.check(limits.throttling)
    }

    pub(super) fn with_canceller(mut self, canceller: Canceller) -> Self {
        self.canceller = canceller;
        self
    }

    pub(super) fn bandwidth(&self) -> &BandwidthLimit {
        &self.bandwidth
    }

    pub(super) fn postcopy_bandwidth(&self) -> &BandwidthLimit {
        &self.postcopy_bandwidth
    }

    pub(super) fn wants_postcopy(&self) -> bool {
        self.limits().postcopy == Postcopy::Wanted
    }

    pub(super) fn connection(&self) -> &ConnectionHandle {
        &self.connection
    }

    /// The size of the cache of sent pages, for the link of another connection.
    pub(super) fn delta_cache_size(&self) -> Option<DeltaCacheSize> {
        self.delta_cache.clone()
    }

    pub(super) fn gate(&self) -> &SwitchoverGate {
        &self.gate
    }

    fn limits(&self) -> MutexGuard<'_, Limits> {
        self.limits.locked()
    }
}

impl Throttleable {
    /// Refuses a method that would have no effect.
    fn check(self, throttling: Option<ThrottlePolicy>) -> Result<(), Error> {
        if throttling.is_some() && self.elsewhere {
            return Err(Error::Config {
                what: "a relay can't slow down a guest that runs at its own source".into(),
                remedy: Remedy::Advice("ask that source for auto-converge or a dirty limit"),
            });
        }
        if matches!(throttling, Some(ThrottlePolicy::DirtyLimit { .. })) && self.counts_vcpus == Some(false) {
            return Err(Error::Config {
                what: "this guest does not report what each of its vCPUs writes, which a dirty limit needs"
                    .into(),
                remedy: Remedy::Advice("use auto-converge, or a VMM that counts by vCPU (KVM's dirty ring)"),
            });
        }
        Ok(())
    }
}

/// Holds a migration between the pause of its guest and the last pages, until it is opened. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct SwitchoverGate(Arc<(Mutex<bool>, Condvar)>);

impl SwitchoverGate {
    fn open(&self) {
        *self.0.0.locked() = true;
        self.0.1.notify_all();
    }

    /// The next wait is for the next [`open`](Self::open).
    pub(super) fn close(&self) {
        *self.0.0.locked() = false;
    }

    /// Waits at most `time`; true once it is open.
    pub(super) fn wait(&self, time: Duration) -> bool {
        let open = self.0.0.locked();
        let waited = self.0.1.wait_timeout_while(open, time, |open| !*open);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}
