//! The guests that the demo can migrate, with a common trait.

use std::io;
use std::sync::Arc;

use clap::ValueEnum;
use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
use ramwire::guest::{Choice, DirtySource, GuestControl, MappedGuest, VcpuThreads, WrittenPages, choose};
use ramwire::units::Rate;

use super::{Args, Failure};

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum GuestKind {
    /// Threads that write pages
    Synthetic,
    /// A KVM virtual machine, whose vCPUs write them
    Kvm,
}

impl GuestKind {
    /// Its name on the command line.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Synthetic => "synthetic",
            Self::Kvm => "kvm",
        }
    }

    /// A paused guest over fresh, filled memory, and its dirty sources.
    pub(super) fn filled(
        self,
        args: &Args,
        memory: Arc<MappedGuest>,
    ) -> Result<(Box<dyn DemoGuest>, Choice), Failure> {
        match self {
            Self::Synthetic => synthetic(args, memory),
            #[cfg(feature = "kvm")]
            Self::Kvm => kvm::filled(args, memory),
            #[cfg(not(feature = "kvm"))]
            Self::Kvm => Err(NO_KVM.into()),
        }
    }

    /// A guest that waits for its state; one that is `reading` reads all memory while it runs there.
    pub(super) fn empty(
        self,
        memory: Arc<MappedGuest>,
        reading: bool,
    ) -> Result<Box<dyn DemoGuest>, Failure> {
        match self {
            Self::Synthetic => {
                let guest = SyntheticGuest::empty(memory);
                Ok(Box::new(if reading { guest.reading() } else { guest }))
            }
            #[cfg(feature = "kvm")]
            Self::Kvm => kvm::empty(memory),
            #[cfg(not(feature = "kvm"))]
            Self::Kvm => Err(NO_KVM.into()),
        }
    }
}

#[cfg(not(feature = "kvm"))]
const NO_KVM: &str = "--guest kvm: this ramwire was built without the feature kvm";

/// Result of a check of every page.
pub(super) struct Found {
    pub(super) pages: u64,
    pub(super) wrong: u64,
    /// The first wrong ones, as text.
    pub(super) faults: Vec<String>,
}

/// A guest that can check whether all of it arrived.
pub(super) trait DemoGuest: Send {
    /// A handle that controls it.
    fn control(&self) -> Box<dyn GuestControl>;

    /// What tells of its writes without a userfaultfd, which a snapshot needs itself.
    fn written(&self) -> Result<Arc<dyn DirtySource>, Failure>;

    /// The threads of its vCPUs, as far as they are known.
    fn vcpu_threads(&self) -> VcpuThreads {
        VcpuThreads::default()
    }

    /// Looks at every page; the guest stands still.
    fn verify(&self) -> io::Result<Found>;

    /// Number of pages that its threads have read while it ran here, and whether none is left to read.
    fn read_so_far(&self) -> (u64, bool) {
        (0, true)
    }
}

impl DemoGuest for SyntheticGuest {
    fn control(&self) -> Box<dyn GuestControl> {
        Box::new(self.clone())
    }

    fn written(&self) -> Result<Arc<dyn DirtySource>, Failure> {
        Ok(self.software())
    }

    fn vcpu_threads(&self) -> VcpuThreads {
        Self::vcpu_threads(self)
    }

    fn verify(&self) -> io::Result<Found> {
        let report = Self::verify(self)?;
        let faults = report.faults.iter().take(8).map(ToString::to_string).collect();
        Ok(Found { pages: report.pages, wrong: report.wrong, faults })
    }

    fn read_so_far(&self) -> (u64, bool) {
        (self.pages_read(), self.is_read())
    }
}

fn synthetic(args: &Args, memory: Arc<MappedGuest>) -> Result<(Box<dyn DemoGuest>, Choice), Failure> {
    let config = SyntheticConfig {
        seed: args.seed,
        zero: args.zero,
        working_set: args.working_set,
        rate: Some(Rate(args.dirty_rate)),
        writers: args.writers,
        changes: u32::try_from(args.write_size).unwrap_or(u32::MAX),
    };
    let guest = SyntheticGuest::filled(Arc::clone(&memory), config)?;
    let written: Arc<dyn DirtySource> = Arc::new(WrittenPages::new(&*memory));
    let choice = choose(&[written, guest.software()])?;
    Ok((Box::new(guest), choice))
}

/// The VM of docs/examples/tiny-vmm, which uses the library as this command does.
#[cfg(feature = "kvm")]
mod kvm {
    use std::io;
    use std::sync::Arc;

    use ramwire::guest::{Choice, DirtyError, DirtySource, GuestControl, MappedGuest, VcpuThreads, choose};

    use super::{DemoGuest, Found};
    use crate::cli::demo::tiny_vm::{self, Log, Shape, TinyVm};
    use crate::cli::demo::{Args, Failure};

    impl DemoGuest for TinyVm {
        fn control(&self) -> Box<dyn GuestControl> {
            Box::new(self.clone())
        }

        fn written(&self) -> Result<Arc<dyn DirtySource>, Failure> {
            Ok(self.dirty_source()?)
        }

        fn vcpu_threads(&self) -> VcpuThreads {
            Self::vcpu_threads(self)
        }

        fn verify(&self) -> io::Result<Found> {
            let tiny_vm::Found { pages, wrong, faults } = Self::verify(self)?;
            Ok(Found { pages, wrong, faults })
        }
    }

    /// With dirty rings if the kernel has them, otherwise with the dirty log.
    pub(super) fn filled(
        args: &Args,
        memory: Arc<MappedGuest>,
    ) -> Result<(Box<dyn DemoGuest>, Choice), Failure> {
        let shape = Shape {
            vcpus: args.writers,
            working_set: args.working_set,
            rate: Some(args.dirty_rate),
            write_size: u32::try_from(args.write_size).unwrap_or(u32::MAX),
            zero: args.zero.get().into(),
        };
        let (vm, refused) = match TinyVm::filled(memory.clone(), Log::Ring, shape) {
            Ok(vm) => (vm, None),
            Err(error) => {
                let refused = error.downcast::<DirtyError>()?;
                (TinyVm::filled(memory, Log::Bitmap, shape)?, Some(refused))
            }
        };
        let mut choice = choose(&[vm.dirty_source()?])?;
        choice.refused.extend(refused);
        Ok((Box::new(vm), choice))
    }

    /// It is not migrated again, so its writes are not tracked.
    pub(super) fn empty(memory: Arc<MappedGuest>) -> Result<Box<dyn DemoGuest>, Failure> {
        Ok(Box::new(TinyVm::empty(memory, Log::Bitmap)?))
    }
}
