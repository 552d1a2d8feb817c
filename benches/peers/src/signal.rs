//! The first SIGINT or SIGTERM cancels, a second one ends the program immediately.

use ramwire::sys::CancelToken;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Cancels `token` on a signal.
pub fn cancel(token: CancelToken) {
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) else {
        tracing::warn!("no signal handler: a signal ends the process at once");
        return;
    };
    let spawned = std::thread::Builder::new().name("bench-signals".into()).spawn(move || {
        for (count, _) in signals.forever().enumerate() {
            if count > 0 {
                std::process::exit(4);
            }
            token.cancel();
        }
    });
    if let Err(error) = spawned {
        tracing::warn!(%error, "no thread for signals: a signal ends the process at once");
    }
}
