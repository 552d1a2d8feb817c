//! Missing pages that the destination reads from this end's memory, after a switch to postcopy: this end grants keys,
//! and sends no page.
//!
//! # Order that must hold
//!
//! A key is revoked when the destination reports its pages, and before their memory is given back.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::{ServedKeys, SourceEvent};
use crate::error::{Chain, Remedy};
use crate::guest::GuestError;
use crate::stream::native::{MAX_READ_KEYS, Order, ReadKey};
use crate::stream::qemu::command::Command;

use super::SourceSession;
use crate::session::Error;

/// Keys that are granted between two looks at the peer's messages: registering memory takes time.
const KEYS_AT_ONCE: usize = 4;
/// How long a message of the destination is waited for at a time.
const WAIT: Duration = Duration::from_secs(1);

const _: () = assert!(KEYS_AT_ONCE <= MAX_READ_KEYS);

impl SourceSession {
    /// The pages that are dirty now are missing there: on a link whose peer reads them none is sent. Nothing of what was
    /// sent before is under way any more.
    pub(super) fn begin_serving(&mut self) -> Result<(), Error> {
        if !self.wire.link.abilities().serves_reads {
            return Ok(());
        }
        self.wire.link.drain(&self.wire.stop)?;
        self.take_returned()?;
        self.missing.served = Some(ServedKeys::new(self.guest.memory.table(), &self.pages.dirty));
        Ok(())
    }

    /// Grants keys and revokes those that are no longer needed, until the destination has everything or the engine
    /// calls. The destination takes as long as it needs: the connection shows whether it lives.
    pub(super) fn serve_reads(&mut self) -> Result<SourceEvent, Error> {
        self.wire.link.begin_reads(&self.wire.stop)?;
        loop {
            self.poll_return_path()?;
            self.revoke_keys();
            if self.driver.is_called() {
                break;
            }
            let Some(served) = &self.missing.served else { break };
            let (is_granting, is_done) = (served.is_granting(), served.pages_left() == 0);
            match () {
                () if is_granting => self.grant_keys()?,
                () if is_done => break,
                () if self.release_some() => {}
                () => {
                    let left = self
                        .driver
                        .engine
                        .wake_at()
                        .map_or(WAIT, |at| at.saturating_sub(self.driver.clock.now()));
                    self.listen_for(left.min(WAIT))?;
                }
            }
        }
        let pages_left = self.missing.served.as_ref().map_or(0, ServedKeys::pages_left);
        let now = self.driver.clock.now();
        self.figures.sent(now, 0, pages_left, None);
        Ok(SourceEvent::Filled { pages_left })
    }

    /// Registers memory for the next keys, and sends them.
    fn grant_keys(&mut self) -> Result<(), Error> {
        let memory = Arc::clone(&self.guest.memory);
        let Some(served) = &mut self.missing.served else { return Ok(()) };
        let mut keys = Vec::new();
        // The first one goes at once: nothing can be read before it.
        let at_once = if served.has_keys_out() { KEYS_AT_ONCE } else { 1 };
        while keys.len() < at_once * ReadKey::LEN
            && let Some((number, run)) = served.next_grant()
        {
            let landing = memory.table().admit_run(run).map_err(GuestError::from)?;
            let made = match self.wire.link.let_read(landing) {
                Err(error) if served.has_keys_out() => {
                    tracing::debug!(error = %Chain(&error), "memory that is to be read waits until other memory was read");
                    served.put_off(number);
                    break;
                }
                made => made?,
            };
            let Some((address, rkey)) = made else {
                return Err(Error::Config {
                    what: "the destination is to read memory over a connection that can't do that".into(),
                    remedy: Remedy::Advice("use a tcp: or unix: address"),
                });
            };
            served.granted(number);
            let (block, start, len) = (landing.block().0, landing.offset().0, landing.len());
            ReadKey { number, block, start, len, address, rkey }.encode(&mut keys);
        }
        if keys.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        Command::Native(Order::ReadKeys { keys: &keys }).encode(&mut out);
        self.wire.send(&out)?;
        Ok(self.wire.flush()?)
    }

    /// The destination has all pages behind a key.
    pub(super) fn span_is_there(&mut self, number: u32) -> Result<(), Error> {
        if self.missing.served.as_mut().is_some_and(|served| served.received(number)) {
            return Ok(());
        }
        let what = format!("READ_WHOLE of key {number}, which it does not have,");
        Err(Error::OutOfTurn { what, at: None, while_doing: "pages are missing there" })
    }

    fn revoke_keys(&mut self) {
        let memory = Arc::clone(&self.guest.memory);
        let Some(served) = &mut self.missing.served else { return };
        while let Some((number, run)) = served.next_revocation() {
            if let Ok(landing) = memory.table().admit_run(run) {
                self.wire.link.forbid_read(landing);
            }
            served.revoked(number);
            self.pages.dirty.clear_run(run);
            if let Some(release) = &mut self.missing.release {
                release.confirm(run);
            }
        }
    }
}
