//! What a caller may set, with the defaults an embedder may rely on.

use std::time::Duration;

use crate::engine::{OnTimeout, PostcopyRule, ThrottlePolicy};
use crate::guest::VcpuThreads;
use crate::page::ZeroDetection;
use crate::ram::ClearShift;
use crate::stream::qemu::file::Configuration;
use crate::stream::qemu::section::Framing;
use crate::stream::qemu::style::PeerStyle;
use crate::sys::random_id;
use crate::units::{Percent, Rate};

use crate::session::source::RAM_SECTION_ID;
use crate::session::workers::Spawner;
use crate::session::{Incoming, Peer};

/// Postcopy at a source: the guest runs at the destination before all its memory has arrived.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PostcopySettings {
    /// The rule for the switch; [`Control::start_postcopy`](super::Control::start_postcopy) requests it earlier.
    pub rule: PostcopyRule,
    /// Maximum number of bytes a second after the switch (QEMU's `max-postcopy-bandwidth`); no limit. Requested pages
    /// are always sent immediately.
    pub max_bandwidth: Option<Rate>,
    /// How long a lost connection may be followed by another, each time that it is lost, as defined by
    /// [`SourceSession::with_reconnect`](super::SourceSession::with_reconnect). Meanwhile the guest continues at the
    /// destination; a thread that touches a missing page waits. 0: the loss is the end,
    /// [`Outcome::Incomplete`](crate::engine::Outcome::Incomplete).
    pub reconnect_timeout: Duration,
    /// Requested pages are sent on a connection of their own, so that they wait for no others (QEMU's
    /// `postcopy-preempt`, which the destination must have set as well); false. Towards a QEMU a lost connection is
    /// then followed by another only after [`Control::recover`](super::Control::recover), which is to be called once
    /// that QEMU is `postcopy-paused` and listens: a QEMU from 10.1 on ends on a connection that arrives earlier.
    /// [`SourceSession::with_reconnect`](super::SourceSession::with_reconnect) defines how it is made.
    pub preempt: bool,
    /// After the switch the guest's memory is given back to the kernel
    /// ([`GuestMemory::discard`](crate::guest::GuestMemory::discard)) as the destination proves that it has it, a
    /// ramwire or a QEMU; false. Unlike QEMU's `release-ram`, which gives pages back as they are sent, it leaves a lost
    /// connection replaceable. Not for memory whose bytes are kept elsewhere by the same mapping: a shared file loses
    /// them. If the guest is lost at the destination, nothing of it is left here.
    pub release_ram: bool,
}

impl PostcopySettings {
    /// No limit; a lost connection is the end; requested pages go with the others; memory is kept.
    pub fn new(rule: PostcopyRule) -> Self {
        Self {
            rule,
            max_bandwidth: None,
            reconnect_timeout: Duration::ZERO,
            preempt: false,
            release_ram: false,
        }
    }
}

/// How both ends make sure that the destination has what the source sent. Only between ramwire ends: towards a QEMU, and
/// over a connection without a return path, the migration ends with [`Error::Config`](super::Error::Config) before a page is
/// sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Only the numbers of pages are compared.
    #[default]
    Off,
    /// A fingerprint (64 bits) of each page, made when it is sent and when it is placed, is compared after each round,
    /// and before READY. The cost in the downtime follows the pages of the last round. Once the guest runs at the
    /// destination the source compares its memory, which no longer changes, with what it has sent: that finds a write
    /// that a dirty source has lost ([`MemoryCheck`](super::MemoryCheck)). Both sessions end after it. Takes 0.2 % of
    /// RAM at the source, and 0.4 % at the destination.
    Fast,
    /// A digest of all RAM and the device state is made at both ends while the guest is paused, and compared before the
    /// guest is handed over.
    Full,
}

/// Settings of a source: how it begins. What may change while it runs is in its [`Control`](super::Control).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SourceSettings {
    /// Longest permitted downtime; 300 ms.
    pub downtime_limit: Duration,
    /// Maximum number of bytes a second while the guest runs; no limit. Without effect while the guest is paused.
    pub max_bandwidth: Option<Rate>,
    /// How a guest that writes faster than its pages leave is slowed down; not at all.
    pub throttling: Option<ThrottlePolicy>,
    /// Share of the sent bytes that the guest may write before it is throttled (QEMU's `throttle-trigger-threshold`);
    /// 50.
    pub throttle_trigger_threshold: Percent,
    /// When the guest must have been paused, counted from the start, and what happens to the migration otherwise;
    /// never.
    pub timeout: Option<(Duration, OnTimeout)>,
    /// The guest may run at the destination before all its memory has arrived; both ends must agree (QEMU's
    /// `postcopy-ram`). The destination empties its memory for it. `None`: it is migrated without postcopy.
    pub postcopy: Option<PostcopySettings>,
    /// Rate of the link while the guest is paused, for the estimate of the downtime (QEMU's
    /// `avail-switchover-bandwidth`); the measured rate.
    pub switchover_bandwidth: Option<Rate>,
    /// The paused guest waits for [`Control::continue_switchover`](super::Control::continue_switchover), for resources
    /// that must be handed over while it is paused, such as disks (QEMU's `pause-before-switchover`); false.
    pub pause_before_switchover: bool,
    /// Where zero pages are found.
    pub zero_detection: ZeroDetection,
    /// What is compared in addition to the numbers of pages; nothing.
    pub verify: Verify,
    /// Both ends are on this host and share its cores: what both do at once takes twice as long. Counts for the
    /// estimate of the downtime.
    pub same_host: bool,
    /// How long a destination that is connected may take until it reads, and shows by its answers whether it is a
    /// ramwire or a QEMU; 30 s. Silence ends the migration before a page is sent, since it shows nothing about the
    /// peer.
    pub greeting_timeout: Duration,
    /// Without a byte or an answer for this long before COMMIT the migration fails; 30 s.
    pub stall_timeout: Duration,
    /// Without RUNNING for this long after COMMIT the outcome is in doubt; 60 s.
    pub finish_timeout: Duration,
    /// How long a connection to a ramwire that is lost before the guest runs there may be followed by another, in all until a
    /// round is confirmed behind the loss, as defined by [`SourceSession::with_reconnect`](super::SourceSession::with_reconnect). Meanwhile the guest
    /// runs on here, unless it was handed over. The destination must wait for it
    /// ([`DestinationSettings::reconnect_timeout`]); otherwise, and where memory is passed and where
    /// the migration may switch to postcopy, a loss is the end. The connections that follow are byte streams without page
    /// channels, also after one by RDMA. It is the end as well before the destination has
    /// confirmed the setup. 0: it always is.
    pub reconnect_timeout: Duration,
    /// The kind of the peer, if the caller knows it; otherwise the greeting finds it out. A ramwire is greeted in
    /// either case, and a peer that is none ends the migration before a page is sent; a QEMU is not greeted.
    pub peer: Option<Peer>,
    /// How a QEMU peer wants its stream. Follows the machine's name; a machine whose name shows nothing gets what every
    /// QEMU reads, which page channels have not.
    pub style: Option<PeerStyle>,
    /// Pages in one chunk of the clear map.
    pub clear_shift: ClearShift,
    /// The machine as the stream describes it; a QEMU compares it with its own.
    pub configuration: Configuration,
    /// Whether there is a configuration section and footers: as the machine at the other end expects. Both.
    pub framing: Framing,
    /// Data that this VMM sends to the VMM at the other end before that provides memory, in a format of their own: its
    /// devices, its CPU model, a version. Only between ramwires; towards a QEMU, and over a connection without a return
    /// path, the migration ends with [`Error::Config`](super::Error::Config) before a page is sent. Empty: nothing. The
    /// destination finds it in [`Incoming::vmm_configuration`].
    pub vmm_configuration: Vec<u8>,
    /// Memory that has a backing file ([`HostRegion::shared_file`](crate::sys::HostRegion::shared_file)) is passed as a
    /// descriptor, and none of its pages is sent; the rest is sent page by page. Only to a ramwire that [takes
    /// it](DestinationSettings::take_memory), over a UNIX socket; elsewhere all memory is sent page by page. Such files
    /// are sealed against becoming shorter, where they can be, and stay so. After COMMIT nothing at the source may
    /// write to memory that was passed ([`SourceReport::passed`](super::SourceReport::passed)), or punch holes into its
    /// file: it is the destination's guest. Not together with [`postcopy`](Self::postcopy). False.
    pub pass_memory: bool,
    /// Bytes of sections that go between the block list and the first page, as they were captured.
    pub early_sections: Vec<u8>,
    /// The guest is already paused, and stays so until it has arrived: nothing writes to its memory. Only such a guest
    /// may have no dirty source; false. It is "paused" and, after a failure, "resumed" like any other: its
    /// [`GuestControl`](crate::guest::GuestControl) leaves it as it was.
    pub guest_is_paused: bool,
    /// Every page is sent at least once. Without it only the pages that the dirty sources report are sent.
    pub all_dirty_at_start: bool,
    /// Names this migration; 128 random bits.
    pub migration_id: [u8; 16],
    /// Id of the section of pages: our own, or in postcopy through a relay that of the guest's source, so that both ends
    /// can go on without the relay.
    pub(in crate::session) ram_section: u32,
    /// How threads are started.
    pub spawner: Spawner,
}

impl Default for SourceSettings {
    /// The defaults for a guest whose machine has no name.
    fn default() -> Self {
        Self::new(Configuration::default())
    }
}

impl SourceSettings {
    /// The defaults for a guest of this machine.
    pub fn new(configuration: Configuration) -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            max_bandwidth: None,
            throttling: None,
            throttle_trigger_threshold: Percent::new(50).unwrap_or_default(),
            timeout: None,
            postcopy: None,
            switchover_bandwidth: None,
            pause_before_switchover: false,
            zero_detection: ZeroDetection::default(),
            verify: Verify::Off,
            same_host: false,
            greeting_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(30),
            finish_timeout: Duration::from_secs(60),
            reconnect_timeout: Duration::ZERO,
            peer: None,
            style: PeerStyle::of_machine(&configuration.machine),
            clear_shift: ClearShift::default(),
            configuration,
            framing: Framing::default(),
            vmm_configuration: Vec::new(),
            pass_memory: false,
            early_sections: Vec::new(),
            guest_is_paused: false,
            all_dirty_at_start: true,
            migration_id: random_id(),
            ram_section: RAM_SECTION_ID,
            spawner: Spawner::default(),
        }
    }

    /// Takes over how another source described its machine, for sending its guest on. A style that was not given
    /// follows the machine.
    pub fn adopt(&mut self, incoming: &Incoming) {
        if self.peer.is_none() {
            let style = PeerStyle::of_source(&incoming.configuration.machine, &incoming.seen);
            self.style = style.or(self.style);
        }
        self.configuration = incoming.configuration.clone();
        self.framing = incoming.seen.framing;
        self.vmm_configuration.clone_from(&incoming.vmm_configuration);
        self.early_sections = incoming.early_sections.clone();
    }
}

/// Settings of a destination.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DestinationSettings {
    /// Without a byte for this long before COMMIT the migration fails; 30 s.
    pub stall_timeout: Duration,
    /// Without COMMIT for this long after READY the migration fails; 60 s.
    pub finish_timeout: Duration,
    /// How long a ramwire source may take to connect again after a connection was lost before it knows that the guest runs
    /// here, counted from when this end has noticed the loss; the stall timeout is added, since the source may notice it
    /// later. Where it connects is defined by
    /// [`DestinationSession::with_next_connection`](super::DestinationSession::with_next_connection). The device state may
    /// then be loaded more than once ([`DeviceState::loads_again`](crate::guest::DeviceState::loads_again)). 0: such a loss is
    /// the end.
    pub reconnect_timeout: Duration,
    /// Maximum number of bytes of RAM that are accepted.
    pub max_ram: u64,
    /// Maximum number of bytes of device state that are accepted, and of a VMM's configuration.
    pub max_state: u64,
    /// Take a QEMU's device state that ends with the connection instead of its VM description. Only from a source
    /// without a return path: a source with one waits for our message before it closes.
    pub accept_missing_description: bool,
    /// Whether a source may switch to postcopy: the guest then runs here before its memory is complete. `false`:
    /// refused when the source announces that it may switch.
    pub postcopy: bool,
    /// After a switch to postcopy over `rdma:`, in which this end reads the missing pages of its source's memory: maximum
    /// number of bytes a second that are read and that no thread waits for, in READs of up to 1 MiB. `None`: no limit.
    pub max_read_bandwidth: Option<Rate>,
    /// Pages that were written through the backing file are mapped after their arrival, by a thread that runs only
    /// while a core is idle, so that the guest meets fewer faults. True; of no use where no guest runs here.
    pub map_in_background: bool,
    /// A source on this host may pass memory as descriptors ([`Incoming::passed`](super::Incoming::passed)), which the
    /// [`MemoryProvider`](super::MemoryProvider) then maps instead of memory of its own. Nothing may write to it before
    /// the device state is loaded, which then follows COMMIT. False.
    pub take_memory: bool,
    /// The device state is handed on as it arrived, for programs that store it or send it on; `false`: the state of a
    /// VMM without sections of its own is taken out of the section in which it arrived from a file or a pipe, as it was
    /// saved.
    pub raw_device_state: bool,
    /// The threads of the vCPUs, so that after a switch to postcopy the time that each of them waits for missing pages
    /// is known ([`PageWaits`](crate::observe::PageWaits)). None is known.
    pub vcpu_threads: VcpuThreads,
    /// How threads are started.
    pub spawner: Spawner,
}

impl Default for DestinationSettings {
    fn default() -> Self {
        Self {
            stall_timeout: Duration::from_secs(30),
            finish_timeout: Duration::from_secs(60),
            reconnect_timeout: Duration::ZERO,
            max_ram: 64 << 40,
            max_state: 1 << 30,
            accept_missing_description: false,
            postcopy: false,
            max_read_bandwidth: None,
            map_in_background: true,
            take_memory: false,
            raw_device_state: false,
            vcpu_threads: VcpuThreads::default(),
            spawner: Spawner::default(),
        }
    }
}
