//! What several test modules need of the machine.
#![allow(clippy::unwrap_used)]

use crate::units::PageSize;

/// Lets the kernel hand out `pages` huge pages on demand, as an administrator does before starting VMs with
/// them. Only ever raises the limit; needs root once after a boot.
pub(crate) fn huge_pages(page: PageSize, pages: u64) {
    let kib = page.bytes() / 1024;
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_overcommit_hugepages");
    let now: u64 = std::fs::read_to_string(&path).unwrap().trim().parse().unwrap();
    if now < pages {
        std::fs::write(&path, pages.to_string())
            .unwrap_or_else(|error| panic!("{error}; as root: echo {pages} > {path}"));
    }
}
