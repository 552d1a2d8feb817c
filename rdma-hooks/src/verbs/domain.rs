//! Protection domains and the memory registered in them.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rdma_sys::{
    ibv_access_flags, ibv_alloc_pd, ibv_dealloc_pd, ibv_dereg_mr, ibv_mr, ibv_pd, ibv_reg_mr, ibv_reg_mr_iova,
};

use super::call::{check, check_ptr};
use super::cm::Id;
use super::device;
use crate::fabric::chain;
use crate::fabric::{
    Access, AddressBase, FabricError, ReadDepth, Registration, register_resident_or_on_demand,
};
use crate::region::HostRegion;

/// The device maps whole pages: addresses that differ in these low bits cannot name the same byte.
const PAGE: u64 = 4096;

/// A protection domain on one device, shared by the queue pairs of a migration.
#[derive(Debug)]
pub(super) struct Domain {
    pd: NonNull<ibv_pd>,
    pub(super) max_registration_bytes: u64,
    pub(super) max_requests: usize,
    /// READs at a time that the device offers for each queue pair.
    pub(super) reads: ReadDepth,
    /// Entries that the device takes in the scatter list of a READ.
    pub(super) read_pieces: usize,
    pub(super) on_demand: bool,
    /// The same for memory that READs read or fill.
    on_demand_reads: bool,
    registered: AtomicU64,
    /// Keeps the device open.
    _id: Arc<Id>,
}

// SAFETY: libibverbs calls on a protection domain are thread safe; the pointer is owned.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(super) fn new(id: &Arc<Id>) -> Result<Self, FabricError> {
        let context = id.verbs()?;
        let limits = device::query(context)?;
        let (on_demand, on_demand_reads) = device::on_demand(context);
        // 255 asks librdmacm for what the device offers, which is then not known here.
        let depth = |most: i32| u8::try_from(most.clamp(0, 254)).unwrap_or(0);
        let reads =
            ReadDepth { own: depth(limits.max_qp_init_rd_atom), served: depth(limits.max_qp_rd_atom) };
        // SAFETY: the context is open as long as `id` lives, which this value keeps; freed in `Drop`.
        let pd = check_ptr(unsafe { ibv_alloc_pd(context.as_ptr()) }, "ibv_alloc_pd")?;
        Ok(Self {
            pd,
            max_registration_bytes: limits.max_mr_size,
            max_requests: usize::try_from(limits.max_qp_wr).unwrap_or(1),
            reads,
            read_pieces: usize::try_from(limits.max_sge_rd.min(limits.max_sge)).unwrap_or(1),
            on_demand,
            on_demand_reads,
            registered: AtomicU64::new(0),
            _id: Arc::clone(id),
        })
    }

    pub(super) fn as_ptr(&self) -> *mut ibv_pd {
        self.pd.as_ptr()
    }

    /// Registers guest memory. The result keeps the memory and the domain alive.
    pub(super) fn register(
        self: &Arc<Self>,
        region: &HostRegion,
        access: &[Access],
        base: AddressBase,
    ) -> Result<Registration, FabricError> {
        let bytes = region.len();
        let (address, _) = region.pinned().ok_or(FabricError::NotPinned { bytes })?;
        // A device maps whole pages: an address of our choice must have the same offset in its page.
        let start = match base {
            AddressBase::At(start) if (start ^ address as u64).is_multiple_of(PAGE) => start,
            _ => address as u64,
        };
        let flags = access.iter().fold(0, |flags, right| flags | flags_of(*right));
        let reads = access.iter().any(|right| matches!(right, Access::LocalWrite | Access::RemoteRead));
        let offered = self.on_demand && (self.on_demand_reads || !reads);
        let (mr, on_demand) = register_resident_or_on_demand(offered, |without_residence| {
            // Soft-RoCE (6.18) looks up the pages of such a registration by their addresses in the process, whatever
            // address was passed: with other addresses it finds no page, or the wrong one.
            let (start, more) = match without_residence {
                true => (address as u64, ibv_access_flags::IBV_ACCESS_ON_DEMAND.0),
                false => (start, 0),
            };
            let mr = self.register_raw(address, bytes, start, flags | more);
            mr.map_err(|source| FabricError::Registration {
                bytes,
                registered: self.registered.load(Ordering::Relaxed),
                remedy: remedy(&source),
                source,
            })
        })?;
        let start = if on_demand { address as u64 } else { start };
        self.registered.fetch_add(bytes, Ordering::Relaxed);
        // SAFETY: `mr` is alive until `Mr` drops.
        let (lkey, rkey) = unsafe { (mr.as_ref().lkey, mr.as_ref().rkey) };
        let guard = Mr { mr, bytes, domain: Arc::clone(self), _region: Some(region.clone()) };
        Ok(Registration { lkey, rkey, address: start, len: bytes, on_demand, guard: Box::new(guard) })
    }

    fn register_raw(
        &self,
        address: usize,
        bytes: u64,
        start: u64,
        flags: u32,
    ) -> io::Result<NonNull<ibv_mr>> {
        let length = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        let (pd, place, flags) = (self.as_ptr(), address as *mut libc::c_void, flags as i32);
        // SAFETY:
        // - the domain is alive; the call itself checks that the range is mapped, and fails if not;
        // - the device may use the range until it is deregistered: for guest memory, `PinnedSpan`'s promise holds as
        //   long as the `HostRegion` kept by `Mr`; for buffers, `register_buffer`'s caller keeps them.
        let mr = unsafe {
            if start == address as u64 {
                ibv_reg_mr(pd, place, length, flags)
            } else {
                ibv_reg_mr_iova(pd, place, length, start, flags)
            }
        };
        NonNull::new(mr).ok_or_else(io::Error::last_os_error)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: allocated by us, freed once; registrations and queues hold an `Arc` of this value, so none is left.
        if let Err(error) = check(unsafe { ibv_dealloc_pd(self.as_ptr()) }, "ibv_dealloc_pd") {
            tracing::warn!(error = chain(&error), "protection domain not freed");
        }
    }
}

/// A memory registration. Dropping it deregisters before the memory is released.
#[derive(Debug)]
pub(super) struct Mr {
    mr: NonNull<ibv_mr>,
    bytes: u64,
    domain: Arc<Domain>,
    _region: Option<HostRegion>,
}

// SAFETY: deregistering is thread safe; the pointer is owned.
unsafe impl Send for Mr {}
// SAFETY: nothing changes through `&self`.
unsafe impl Sync for Mr {}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: registered by us, deregistered once; the fields (domain, memory) drop after this.
        match check(unsafe { ibv_dereg_mr(self.mr.as_ptr()) }, "ibv_dereg_mr") {
            Ok(()) => {
                self.domain.registered.fetch_sub(self.bytes, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::error!(
                    error = chain(&error),
                    bytes = self.bytes,
                    "memory not deregistered; kept mapped for good"
                );
                // The device may still use the memory: it must never be unmapped.
                std::mem::forget(self._region.take());
            }
        }
    }
}

/// Registered bytes of this crate's own, for messages.
///
/// The device writes to them at any time, so there is no `&[u8]` of the whole: only [`bytes`](Self::bytes) of a part
/// that is not posted.
#[derive(Debug)]
pub(super) struct Buffer {
    mr: Mr,
    bytes: OwnedBytes,
}

#[derive(Debug)]
struct OwnedBytes(NonNull<[u8]>);

// SAFETY: owned memory, reached only through `Buffer`'s methods.
unsafe impl Send for OwnedBytes {}

impl Drop for OwnedBytes {
    fn drop(&mut self) {
        // SAFETY: came from Box::into_raw, freed once, after the registration (field order in `Buffer`).
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

impl Buffer {
    pub(super) fn new(domain: &Arc<Domain>, len: usize) -> Result<Self, FabricError> {
        Self::with_access(domain, len, ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0)
    }

    /// With more access than messages need (`ibv_access_flags`).
    pub(super) fn with_access(domain: &Arc<Domain>, len: usize, flags: u32) -> Result<Self, FabricError> {
        let boxed = Box::into_raw(vec![0_u8; len].into_boxed_slice());
        let bytes = OwnedBytes(check_ptr(boxed, "allocation")?);
        let address = bytes.0.cast::<u8>().as_ptr() as usize;
        let mr = domain.register_raw(address, len as u64, address as u64, flags);
        let mr = mr.map_err(|source| FabricError::Registration {
            bytes: len as u64,
            registered: domain.registered.load(Ordering::Relaxed),
            remedy: remedy(&source),
            source,
        })?;
        domain.registered.fetch_add(len as u64, Ordering::Relaxed);
        let mr = Mr { mr, bytes: len as u64, domain: Arc::clone(domain), _region: None };
        Ok(Self { mr, bytes })
    }

    pub(super) fn lkey(&self) -> u32 {
        // SAFETY: alive until `Mr` drops.
        unsafe { self.mr.mr.as_ref().lkey }
    }

    pub(super) fn rkey(&self) -> u32 {
        // SAFETY: alive until `Mr` drops.
        unsafe { self.mr.mr.as_ref().rkey }
    }

    pub(super) fn address(&self) -> u64 {
        self.bytes.0.cast::<u8>().as_ptr() as u64
    }

    /// # Safety
    ///
    /// No request that writes to `start..start + len` is posted while the result lives.
    pub(super) unsafe fn bytes(&self, start: usize, len: usize) -> &[u8] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.bytes.0.len()), "inside the buffer");
        // SAFETY: in bounds, as asserted; alive as long as `self`; not written to, by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.bytes.0.cast::<u8>().as_ptr().add(start), len) }
    }

    /// Copies a message's parts to `start`; returns its length.
    ///
    /// # Safety
    ///
    /// No request that uses the range is posted.
    pub(super) unsafe fn fill(&mut self, start: usize, parts: &[&[u8]]) -> usize {
        let mut at = start;
        for part in parts {
            assert!(
                at.checked_add(part.len()).is_some_and(|end| end <= self.bytes.0.len()),
                "inside the buffer"
            );
            // SAFETY: in bounds, as asserted; `part` is not in the buffer, which gives out no `&mut`; no request uses
            // the range, by the caller's promise.
            unsafe {
                self.bytes.0.cast::<u8>().as_ptr().add(at).copy_from_nonoverlapping(part.as_ptr(), part.len())
            };
            at += part.len();
        }
        at - start
    }
}

/// `ibv_access_flags` of `ibv_reg_mr(3)`: reading by this end's device needs none.
fn flags_of(right: Access) -> u32 {
    match right {
        Access::Read => 0,
        Access::LocalWrite => ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0,
        Access::RemoteWrite => {
            ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0 | ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
        }
        Access::RemoteRead => ibv_access_flags::IBV_ACCESS_REMOTE_READ.0,
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            "raise the limit on locked memory (ulimit -l, LimitMEMLOCK=), give the process CAP_IPC_LOCK, or set a pin \
             budget"
        }
        Some(libc::EOPNOTSUPP) => "this kind of memory cannot be registered with this device",
        Some(libc::EFAULT) => "the memory is not mapped as promised",
        Some(libc::EINVAL) => "the device does not take a region of this size or place",
        _ => "the kernel's log may say more",
    }
}
