//! A clock that goes on while the machine is suspended.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Time since the machine was started, with that in which it was suspended.
pub(crate) fn since_boot() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on() {
        let before = since_boot();
        std::thread::sleep(Duration::from_millis(5));
        let passed = since_boot() - before;
        assert!(before > Duration::ZERO && passed >= Duration::from_millis(5), "{passed:?}");
    }
}
