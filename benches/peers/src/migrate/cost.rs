//! The cost of a run for a process: processor time and page faults, of all its threads.

use std::io;

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Resources that a process has used, in total or since an earlier measurement.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Processor time in seconds, user and system.
    pub cpu_seconds: f64,
    /// Part of it in the program itself: time in the kernel, including its work for a software device, is left out. In
    /// steps of 10 ms.
    pub user_seconds: f64,
    /// Page faults that needed no I/O.
    pub page_faults: u64,
}

impl Cost {
    /// Of this process so far.
    ///
    /// # Errors
    /// The kernel does not report it.
    pub fn own() -> io::Result<Self> {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let cpu_seconds = time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
        let seen = Self::of_process(std::process::id()).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self { cpu_seconds, ..seen })
    }

    /// For another process so far, including its ended threads (proc(5): fields 10, 14 and 15 of stat).
    pub fn of_process(id: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
        // The name in parentheses may contain anything, also spaces and parentheses; field 3 comes next.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let seconds = |ticks: u64| ticks as f64 / rustix::param::clock_ticks_per_second() as f64;
        let (user, system) = (seconds(field(14)?), seconds(field(15)?));
        Some(Self { cpu_seconds: user + system, user_seconds: user, page_faults: field(10)? })
    }

    /// The cost since `before`.
    pub fn since(self, before: Self) -> Self {
        Self {
            cpu_seconds: self.cpu_seconds - before.cpu_seconds,
            user_seconds: self.user_seconds - before.user_seconds,
            page_faults: self.page_faults.saturating_sub(before.page_faults),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn both_ways_of_asking_agree() {
        let before = Cost::own().unwrap();
        let touched = vec![1u8; 8 << 20];
        let own = Cost::own().unwrap().since(before);
        assert!(own.page_faults >= 1 && touched[4096] == 1, "{own:?}");
        let (own, seen) = (Cost::own().unwrap(), Cost::of_process(std::process::id()).unwrap());
        // There the kernel reports ticks of 10 ms, rounded for each thread.
        assert!((own.cpu_seconds - seen.cpu_seconds).abs() < 1.0, "{own:?} {seen:?}");
        assert!(own.page_faults.abs_diff(seen.page_faults) < 10_000, "{own:?} {seen:?}");
        assert_eq!(Cost::of_process(u32::MAX), None);
    }
}
