#![allow(clippy::unwrap_used)]
use super::*;
use crate::sys::testing::huge_pages;

fn byte(region: &HostRegion, offset: u64) -> u8 {
    let mut out = [0];
    region.span(offset, 1).unwrap().copy_to(&mut out);
    out[0]
}

fn fill(region: &HostRegion, value: u8) {
    region.span(0, region.len()).unwrap().copy_from(&vec![value; region.len() as usize]);
}

/// All backings behave the same: zero at first, preserved by populate, zero where discarded and nowhere else.
#[test]
fn every_backing_populates_and_discards() {
    huge_pages(PageSize::SIZE_2M, 16);
    const MIB: u64 = 1 << 20;
    let on_disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let in_shm = tempfile::tempfile_in("/dev/shm").unwrap();
    let cases = [
        ("anonymous", Mapping::anonymous(4 * MIB)),
        ("anonymous huge", Mapping::anonymous_huge(3 * MIB, PageSize::SIZE_2M)),
        ("memfd", Mapping::memfd("ram", 4 * MIB)),
        ("memfd huge", Mapping::memfd_huge("ram", 3 * MIB, PageSize::SIZE_2M)),
        ("file", Mapping::file_grown(on_disk.into(), 0, 4 * MIB, true)),
        ("file on tmpfs", Mapping::file_grown(in_shm.into(), 8192, 4 * MIB, false)),
    ];
    for (what, mapping) in cases {
        let mapping = mapping.unwrap_or_else(|error| panic!("{what}: {error}"));
        let region = mapping.region();
        assert_eq!(region.len(), 4 * MIB, "{what}");
        assert_eq!(region.page() == PageSize::SIZE_2M, what.ends_with("huge"), "{what}");
        assert_eq!(byte(region, 4 * MIB - 1), 0, "{what}");
        fill(region, 7);
        populate(region.span(100, 5000).unwrap()).unwrap();
        assert_eq!(byte(region, 100), 7, "{what}: populate keeps contents");
        discard(region.span(4095, 2 * MIB + 4098).unwrap(), region.page()).unwrap();
        let zero = |offset| byte(region, offset) == 0;
        assert!(!zero(4094) && zero(4095) && zero(4096) && zero(MIB), "{what}: head");
        assert!(zero(2 * MIB + 8192) && !zero(2 * MIB + 8193) && !zero(4 * MIB - 1), "{what}: tail");
    }
}

#[test]
fn huge_pages_are_asked_for() {
    if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
        eprintln!("SKIPPED: this kernel has no transparent huge pages");
        return;
    }
    let mapping = Mapping::anonymous((4 << 20) + 100).unwrap();
    let advised = || {
        let (mut inside, start) = (false, mapping.region().address());
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        smaps.lines().any(|line| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let hex = |text| usize::from_str_radix(text, 16).ok();
            if let Some((Some(from), Some(to))) = range.map(|(from, to)| (hex(from), hex(to))) {
                inside = (from..to).contains(&start);
            }
            inside && line.starts_with("VmFlags:") && line.contains(" hg")
        })
    };
    assert!(!advised());
    mapping.advise_huge_pages().unwrap();
    assert!(advised());
    fill(mapping.region(), 7);
}

#[test]
fn a_private_file_mapping_is_zeroed_by_store() {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(8192).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 8192], 0).unwrap();
    // SAFETY: the test does not truncate the file, and no slice of the map is taken.
    let mut map = unsafe { MmapOptions::new().map_copy(&file).unwrap() };
    let base = NonNull::new(map.as_mut_ptr()).unwrap();
    // SAFETY: the map lives in the Arc.
    let region = unsafe { HostRegion::from_raw(base, 8192, PageSize::SIZE_4K, Arc::new(map)) };
    discard(region.span(0, 4096).unwrap(), region.page()).unwrap();
    assert_eq!((byte(&region, 0), byte(&region, 4096)), (0, 9));
}

#[test]
fn a_file_mapped_twice_is_the_same_memory() {
    let first = Mapping::memfd("ram", 16384).unwrap();
    let (fd, offset) = first.backing().unwrap();
    let second = Mapping::file(fd.try_clone_to_owned().unwrap(), offset + 4096, 8192).unwrap();
    fill(second.region(), 3);
    assert_eq!([0, 4096, 12287, 12288].map(|at| byte(first.region(), at)), [0, 3, 3, 0]);
}

#[test]
fn what_cannot_be_mapped_is_refused_with_its_remedy() {
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        OwnedFd::from(file)
    };
    let read_only = || OwnedFd::from(std::fs::File::open("/proc/self/exe").unwrap());
    let huge = |len| Mapping::memfd_huge("ram", len, PageSize::SIZE_2M);
    #[rustfmt::skip]
    let cases = [
        ("no bytes",             Mapping::anonymous(0),                 "1 byte"),
        ("no address space",     Mapping::anonymous(u64::MAX),          "address space"),
        ("more than there is",   Mapping::anonymous(1 << 46),           "vm.overcommit_memory"),
        ("short file",           Mapping::file(file(), 4096, 8192),     "make the file longer"),
        ("offset overflows",     Mapping::file(file(), !4095, 8192),    "make the file longer"),
        ("odd offset",           Mapping::file(file(), 512, 4096),      "multiple"),
        ("read-only file",       Mapping::file(read_only(), 0, 4096),   "open it for reading and writing"),
        ("huge rounds over",     huge(u64::MAX),                        "address space"),
        ("huge beyond the pool", huge(1 << 44),                         "hugepages-2048kB/nr_hugepages"),
        ("anon huge, too many",  Mapping::anonymous_huge(1 << 44, PageSize::SIZE_2M), "add 8388608 to"),
    ];
    for (what, mapping, remedy) in cases {
        let error = mapping.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(remedy), "{what}: {error}");
    }
}
