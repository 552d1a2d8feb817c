//! The live Linux guest of `ci/linux-guest`: it keeps writing and checking its memory and prints the results.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{
    Deadline,
    qemu::{Guest, Machine, Version},
};

/// Guest memory of a writer; the kernel needs about 100 MiB of it.
///
/// Not a multiple of 256 KiB, because emulated guests of QEMU 7.2 lose writes otherwise: if a block's length is a
/// multiple, its dirty bitmap is read 64 pages at a time, and the emulator is not notified that these pages are clean
/// again (fixed in QEMU 9.0). Page by page it is notified.
pub(crate) const WRITER_RAM_KIB: usize = (192 << 10) + 8;

/// What a writer boots from.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    kernel: PathBuf,
    disk: PathBuf,
}

/// Kernel and disk, made on the first call; otherwise reports what is missing (and fails if `CI=true`).
pub(crate) fn images() -> Option<Images> {
    let script = super::project_root().join("ci/linux-guest");
    let made =
        Command::new(script).arg("writer").stdin(Stdio::null()).output().expect("cannot run ci/linux-guest");
    let paths = String::from_utf8_lossy(&made.stdout);
    let mut paths = paths.lines().map(PathBuf::from);
    match (made.status.success(), paths.next(), paths.next()) {
        (true, Some(kernel), Some(disk)) => Some(Images { kernel, disk }),
        _ => {
            super::skip(&format!("there is no writer guest: {}", String::from_utf8_lossy(&made.stderr)));
            None
        }
    }
}

/// How much a writer writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Memory under test, in MiB.
    pub(crate) mib: usize,
    /// Pages of 4 KiB written in a second.
    pub(crate) pages_per_second: usize,
    /// A write changes sixteen bytes of its page, not all of it.
    pub(crate) small: bool,
}

/// A running guest that boots the writer; with [`Guest::incoming`] its destination.
///
/// `ram` becomes an empty file, and `console` receives the guest's output.
pub(crate) fn guest(
    images: &Images,
    version: Version,
    machine: Machine,
    load: Load,
    ram: &Path,
    console: &Console,
) -> Guest {
    let file = File::create(ram).expect("cannot create guest memory");
    file.set_len(WRITER_RAM_KIB as u64 * 1024).expect("cannot size guest memory");
    // On a busy host an emulated timer is late and the kernel would fail; a microvm's timers are no reference for its
    // calibration, which would never end.
    let clocks = if machine == Machine::Microvm { "acpi=off lpj=4000000" } else { "" };
    let options = format!(
        "console=ttyS0 quiet panic=-1 nokaslr mitigations=off random.trust_cpu=on no_timer_check {clocks} WRITER_MIB={} WRITER_RATE={} WRITER_SMALL={}",
        load.mib,
        load.pages_per_second,
        u8::from(load.small),
    );
    let mut guest = Guest::new(version, machine, ram, 0)
        .running()
        .with(["-no-reboot", "-cpu", "qemu64", "-append", &options])
        .with(["-kernel".into(), images.kernel.clone(), "-initrd".into(), images.disk.clone()])
        .with(["-serial", &format!("file:{}", console.path.display())]);
    guest.ram_kib = WRITER_RAM_KIB;
    guest
}

/// One line of progress.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tick {
    /// From 1; five in a second of the guest's time.
    pub(crate) number: u64,
    /// Pages written so far.
    pub(crate) sequence: u64,
    /// How often all memory was checked.
    pub(crate) passes: u64,
    /// Pages found wrong so far.
    pub(crate) bad: u64,
}

impl Tick {
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let bad = match words.get(6..)? {
            ["ok"] => 0,
            ["bad", count] => count.parse().ok()?,
            _ => return None,
        };
        let ["tick", number, "seq", sequence, "passes", passes] = words[..6] else { return None };
        Some(Self {
            number: number.parse().ok()?,
            sequence: sequence.parse().ok()?,
            passes: passes.parse().ok()?,
            bad,
        })
    }
}

/// The output of a writer on one host.
#[derive(Clone, Debug)]
pub(crate) struct Console {
    path: PathBuf,
}

impl Console {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(crate) fn text(&self) -> String {
        fs::read(&self.path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// All ticks so far.
    pub(crate) fn ticks(&self) -> Vec<Tick> {
        ticks(&self.text())
    }

    /// Waits until a tick satisfies the condition, and returns it.
    ///
    /// # Panics
    ///
    /// At the deadline or when the guest's kernel has given up, with the console.
    pub(crate) fn wait_tick(&self, what: &str, deadline: Deadline, wanted: impl Fn(&Tick) -> bool) -> Tick {
        let state = || format!("console {}:\n{}", self.path.display(), self.text());
        deadline.poll(what, state, || {
            assert!(!self.text().contains("Kernel panic"), "{what}: the guest's kernel gave up\n{}", state());
            self.ticks().into_iter().find(&wanted)
        })
    }
}

fn ticks(console: &str) -> Vec<Tick> {
    // A line that is still being printed has no newline yet.
    console.split_inclusive('\n').filter(|line| line.ends_with('\n')).filter_map(Tick::parse).collect()
}

/// Checks a guest's whole life, from the consoles of the hosts it ran on, in order.
///
/// # Panics
///
/// If a page was wrong, a tick is missing or duplicated, or the counts decreased.
pub(crate) fn assert_unbroken(consoles: &[&Console]) -> Tick {
    // A line that begins on one host ends on the next.
    let text: String = consoles.iter().map(|console| console.text()).collect();
    assert!(!text.contains("CORRUPT"), "{text}");
    let ticks = ticks(&text);
    for (at, tick) in ticks.iter().enumerate() {
        assert_eq!((tick.number, tick.bad), (at as u64 + 1, 0), "tick {tick:?} at place {at}\n{text}");
    }
    for pair in ticks.windows(2) {
        assert!(pair[0].sequence <= pair[1].sequence && pair[0].passes <= pair[1].passes, "{pair:?}\n{text}");
    }
    *ticks.last().unwrap_or_else(|| panic!("the guest never ticked\n{text}"))
}
