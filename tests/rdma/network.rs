//! Two soft-RoCE devices, one for each end of a migration.

use std::process::{Command, Stdio};

use crate::common::Deadline;

/// An end of the network that tests break: the source's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Near,
}

impl End {
    /// Its network interface.
    fn interface(self) -> &'static str {
        match self {
            Self::Near => "va",
        }
    }
}

/// Two devices whose packets go over a pair of network interfaces: within one device they stay inside the driver.
pub(crate) struct Network;

pub(crate) const NEAR: &str = "10.9.1.1";
pub(crate) const FAR: &str = "10.9.1.2";

fn run(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
}

impl Network {
    pub(crate) fn new() -> Self {
        let is_free = || (!std::path::Path::new("/sys/class/net/va").exists()).then_some(());
        Deadline::seconds(60).poll("the network of the test before is gone", String::new, is_free);
        let made = Self;
        // Addresses of this host are local before any other route is looked at. Here a packet that has arrived is local,
        // and one that leaves has a route.
        run(&format!(
            "ip link add va type veth peer name vb
             for end in va vb; do
                 for set in accept_local=1 rp_filter=0 arp_ignore=1; do
                     echo ${{set#*=}} >/proc/sys/net/ipv4/conf/$end/${{set%=*}}
                 done
                 ip link set $end mtu 9000 up
             done
             echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter
             ip addr add {NEAR}/24 dev va
             ip addr add {FAR}/24 dev vb
             ip rule add pref 1 iif va lookup local
             ip rule add pref 2 iif vb lookup local
             ip rule add pref 3 to {FAR} lookup 101
             ip rule add pref 4 to {NEAR} lookup 102
             ip route add {FAR} dev va src {NEAR} table 101
             ip route add {NEAR} dev vb src {FAR} table 102
             ip rule add pref 100 lookup local
             ip rule del pref 0
             rdma link add rxevb type rxe netdev vb
             rdma link add rxeva type rxe netdev va"
        ));
        made
    }

    /// The link of one end goes down.
    pub(crate) fn down(&self, end: End) {
        run(&format!("ip link set {} down", end.interface()));
    }

    /// Whatever one end sends is lost, and nobody is told.
    pub(crate) fn swallow(&self, end: End) {
        run(&format!("tc qdisc add dev {} root netem loss 100%", end.interface()));
    }

    /// What it sends arrives again.
    pub(crate) fn pass(&self, end: End) {
        run(&format!("tc qdisc del dev {} root", end.interface()));
    }

    /// Waits until one end has sent so many bytes from now on.
    pub(crate) fn carries(&self, end: End, bytes: u64, told: impl Fn() -> String) {
        let path = format!("/sys/class/net/{}/statistics/tx_bytes", end.interface());
        let sent = || std::fs::read_to_string(&path).unwrap().trim().parse::<u64>().unwrap();
        let before = sent();
        let text = || format!("{} bytes; {}", sent() - before, told());
        Deadline::seconds(60).poll("pages travel", text, || (sent() - before >= bytes).then_some(()));
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // A device is there until no process uses it, also if that is this one: nobody waits here.
        let script =
            "ip rule add pref 0 lookup local; for pref in 1 2 3 4 100; do ip rule del pref $pref; done
             rdma link delete rxeva; rdma link delete rxevb; ip link del va";
        let _ = Command::new("sh").args(["-c", script]).stdin(Stdio::null()).spawn();
    }
}
