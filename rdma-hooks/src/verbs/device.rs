//! Which verbs devices this host has, and what they can do for a migration.

use std::ffi::CStr;
use std::io;
use std::net::IpAddr;
use std::ptr::{self, NonNull};

use rdma_sys::{
    ibv_alloc_pd, ibv_close_device, ibv_context, ibv_create_cq, ibv_create_qp, ibv_dealloc_pd,
    ibv_destroy_cq, ibv_destroy_qp, ibv_device, ibv_device_attr, ibv_device_attr_ex, ibv_free_device_list,
    ibv_get_device_list, ibv_get_device_name, ibv_open_device, ibv_port_attr, ibv_qp_cap, ibv_qp_init_attr,
    ibv_qp_type, ibv_query_device, ibv_query_device_ex, ibv_query_gid, ibv_query_port,
};

use super::addresses::{BoundAddress, bound_addresses, of_port};
use super::call::{check, check_ptr};
use super::queue::INLINE_BYTES;
use crate::fabric::FabricError;

/// What a port is wired to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// InfiniBand.
    InfiniBand,
    /// Ethernet: RoCE, soft-RoCE, iWARP.
    Ethernet,
    /// Anything else, by its number.
    Other(u8),
}

/// Whether a port carries traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// It does.
    Active,
    /// The port is not active; the number is the state of the InfiniBand specification (1 is down).
    Inactive(u32),
}

/// One port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// Counted from 1.
    pub number: u8,
    /// Whether it carries traffic.
    pub state: PortState,
    /// What it is wired to.
    pub link_layer: LinkLayer,
    /// Path MTU in use, bytes.
    pub mtu_bytes: u32,
    /// Longest message, bytes.
    pub max_message_bytes: u32,
    /// This host's IP addresses whose connections use this port, as the connection manager reports; IPv4 ones first.
    pub addresses: Vec<IpAddr>,
    /// Its GIDs that are set, at most 16, in network byte order. Only those of RoCE are IP addresses.
    pub gids: Vec<[u8; 16]>,
}

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// As the kernel names it, such as `mlx5_0` or `rxe0`.
    pub name: String,
    /// Firmware version; empty for a software device.
    pub firmware: String,
    /// Longest memory registration, bytes.
    pub max_registration_bytes: u64,
    /// Most registrations at a time.
    pub max_registrations: u32,
    /// Most requests on a queue pair.
    pub max_requests: u32,
    /// Most queue pairs.
    pub max_queue_pairs: u32,
    /// Maximum number of bytes inside a request, up to the longest control message; 0: none. It saves the device a read
    /// of memory for each.
    pub max_inline_bytes: u32,
    /// Registered memory need not be resident (on-demand paging) for RDMA WRITE on reliable connections.
    pub on_demand: bool,
    /// Its ports.
    pub ports: Vec<PortInfo>,
}

/// Most GIDs reported of a port.
const MAX_GIDS: i32 = 16;

/// All devices this process may open, in the kernel's order. A device that cannot be opened is left out. Without a
/// connection manager no port has an address.
///
/// # Errors
///
/// [`FabricError::Unavailable`] if there is no library or no device at all.
pub fn devices() -> Result<Vec<DeviceInfo>, FabricError> {
    let list = DeviceList::get()?;
    let bound = bound_addresses().unwrap_or_else(|error| {
        tracing::debug!(%error, "the addresses of RDMA devices are not known");
        Vec::new()
    });
    let opened = list.entries().filter_map(|device| OpenDevice::open(device).ok());
    opened.map(|device| device.info(&bound)).collect()
}

/// # Errors
///
/// [`FabricError::Unavailable`] unless there is a device.
pub(super) fn any_device() -> Result<(), FabricError> {
    DeviceList::get().map(drop)
}

pub(super) struct DeviceList {
    list: NonNull<*mut ibv_device>,
    count: usize,
}

impl DeviceList {
    pub(super) fn get() -> Result<Self, FabricError> {
        let mut count = 0;
        // SAFETY: `count` outlives the call; the result is null or an array we free in `Drop`.
        let list = unsafe { ibv_get_device_list(&mut count) };
        let list = NonNull::new(list).ok_or_else(|| {
            let source = io::Error::last_os_error();
            // The bindings' answer where the library could not be loaded.
            let (what, remedy) = match source.raw_os_error() {
                Some(libc::EOPNOTSUPP) => (
                    "loading libibverbs.so.1",
                    "install rdma-core (libibverbs1, librdmacm1, ibverbs-providers)",
                ),
                _ => ("libibverbs finds no devices", "load a device driver"),
            };
            FabricError::Unavailable { what, remedy, source }
        })?;
        let list = Self { list, count: usize::try_from(count).unwrap_or(0) };
        if list.count == 0 {
            return Err(FabricError::Unavailable {
                what: "no RDMA device",
                remedy: "load a device driver, or add soft-RoCE: rdma link add rxe0 type rxe netdev INTERFACE",
                source: io::ErrorKind::NotFound.into(),
            });
        }
        Ok(list)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = NonNull<ibv_device>> + '_ {
        // SAFETY: the library promises `count` entries at `list`, which lives until `Drop`.
        let entry = |index| unsafe { *self.list.as_ptr().add(index) };
        (0..self.count).filter_map(move |index| NonNull::new(entry(index)))
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        // SAFETY: `list` came from ibv_get_device_list and is freed once.
        unsafe { ibv_free_device_list(self.list.as_ptr()) }
    }
}

struct OpenDevice {
    context: NonNull<ibv_context>,
    name: String,
}

impl OpenDevice {
    fn open(device: NonNull<ibv_device>) -> Result<Self, FabricError> {
        let name = device_name(device);
        // SAFETY: `device` is an entry of a live list; the context is closed in `Drop`.
        let context = check_ptr(unsafe { ibv_open_device(device.as_ptr()) }, "ibv_open_device")?;
        Ok(Self { context, name })
    }

    fn info(&self, bound: &[BoundAddress]) -> Result<DeviceInfo, FabricError> {
        let attr = query(self.context)?;
        let firmware =
            attr.fw_ver.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8 as char).collect();
        let number = |value: i32| u32::try_from(value).unwrap_or(0);
        let ports = (1..=attr.phys_port_cnt).filter_map(|port| self.port(port, bound).ok()).collect();
        Ok(DeviceInfo {
            name: self.name.clone(),
            firmware,
            max_registration_bytes: attr.max_mr_size,
            max_registrations: number(attr.max_mr),
            max_requests: number(attr.max_qp_wr),
            max_queue_pairs: number(attr.max_qp),
            max_inline_bytes: self.inline_limit().unwrap_or(0),
            on_demand: on_demand(self.context).0,
            ports,
        })
    }

    /// A device reports this only for an existing queue pair, so one is created and destroyed.
    fn inline_limit(&self) -> Option<u32> {
        // SAFETY: the context is open; objects made from it here are destroyed in reverse order below.
        unsafe {
            let domain = NonNull::new(ibv_alloc_pd(self.context.as_ptr()))?;
            let queue = ibv_create_cq(self.context.as_ptr(), 1, ptr::null_mut(), ptr::null_mut(), 0);
            let mut limit = None;
            if !queue.is_null() {
                // SAFETY (of the zeros): plain numbers and pointers that may be null.
                let mut attr: ibv_qp_init_attr = std::mem::zeroed();
                (attr.send_cq, attr.recv_cq) = (queue, queue);
                attr.qp_type = ibv_qp_type::IBV_QPT_RC;
                attr.cap = ibv_qp_cap {
                    max_send_wr: 1,
                    max_recv_wr: 1,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: INLINE_BYTES,
                };
                let pair = ibv_create_qp(domain.as_ptr(), &mut attr);
                if !pair.is_null() {
                    limit = Some(attr.cap.max_inline_data);
                    ibv_destroy_qp(pair);
                }
                ibv_destroy_cq(queue);
            }
            ibv_dealloc_pd(domain.as_ptr());
            limit
        }
    }

    fn port(&self, number: u8, bound: &[BoundAddress]) -> Result<PortInfo, FabricError> {
        let attr = query_port(self.context, number)?;
        let gid = |index: i32| {
            // SAFETY: ibv_gid is 16 bytes, for which zeros are valid.
            let mut gid: rdma_sys::ibv_gid = unsafe { std::mem::zeroed() };
            // SAFETY: the context is open; `gid` outlives the call.
            let got = unsafe { ibv_query_gid(self.context.as_ptr(), number, index, (&raw mut gid).cast()) };
            // SAFETY: every bit pattern of the union is a valid `raw`.
            let raw = unsafe { gid.raw };
            (got == 0 && raw != [0; 16]).then_some(raw)
        };
        Ok(PortInfo {
            number,
            state: state_of(&attr),
            link_layer: match attr.link_layer {
                0 | 1 => LinkLayer::InfiniBand,
                2 => LinkLayer::Ethernet,
                other => LinkLayer::Other(other),
            },
            mtu_bytes: 128_u32.checked_shl(attr.active_mtu).unwrap_or(0),
            max_message_bytes: attr.max_msg_sz,
            addresses: of_port(bound, &self.name, number),
            gids: (0..attr.gid_tbl_len.min(MAX_GIDS)).filter_map(gid).collect(),
        })
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        // SAFETY: opened by us, closed once; nothing was made from it.
        let _ = unsafe { ibv_close_device(self.context.as_ptr()) };
    }
}

/// As the kernel names it. The caller's device is an entry of a live list, or that of an open context.
pub(super) fn device_name(device: NonNull<ibv_device>) -> String {
    // SAFETY: the caller's device is alive; the name is a string inside it.
    unsafe {
        let name = ibv_get_device_name(device.as_ptr());
        if name.is_null() { String::new() } else { CStr::from_ptr(name).to_string_lossy().into_owned() }
    }
}

/// Whether a port of an open device carries traffic.
pub(super) fn port_state(context: NonNull<ibv_context>, number: u8) -> Result<PortState, FabricError> {
    query_port(context, number).map(|attr| state_of(&attr))
}

fn state_of(attr: &ibv_port_attr) -> PortState {
    if attr.state == 4 { PortState::Active } else { PortState::Inactive(attr.state) }
}

pub(super) fn query_port(context: NonNull<ibv_context>, number: u8) -> Result<ibv_port_attr, FabricError> {
    // SAFETY: ibv_port_attr is plain numbers, for which zeros are valid.
    let mut attr: ibv_port_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the caller's context is open; `attr` outlives the call.
    check(unsafe { ibv_query_port(context.as_ptr(), number, &mut attr) }, "ibv_query_port")?;
    Ok(attr)
}

/// A device's limits.
pub(super) fn query(context: NonNull<ibv_context>) -> Result<ibv_device_attr, FabricError> {
    // SAFETY: ibv_device_attr is plain numbers, for which zeros are valid.
    let mut attr: ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the caller's context is open; `attr` outlives the call.
    check(unsafe { ibv_query_device(context.as_ptr(), &mut attr) }, "ibv_query_device")?;
    Ok(attr)
}

/// Whether memory need not be resident on a reliable connection: for sends and writes, and for READs.
pub(super) fn on_demand(context: NonNull<ibv_context>) -> (bool, bool) {
    const WRITES: u32 = rdma_sys::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_SEND.0
        | rdma_sys::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE.0;
    const READS: u32 = rdma_sys::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_READ.0;
    // SAFETY: ibv_device_attr_ex is plain numbers, for which zeros are valid.
    let mut attr: ibv_device_attr_ex = unsafe { std::mem::zeroed() };
    // SAFETY: the caller's context is open; no input is allowed; `attr` outlives the call.
    let queried = unsafe { ibv_query_device_ex(context.as_ptr(), std::ptr::null(), &mut attr) };
    let offers = |bits| queried == 0 && attr.odp_caps.per_transport_caps.rc_odp_caps & bits == bits;
    (offers(WRITES), offers(READS))
}
