//! Real QEMUs at the other end, over a real verbs device: RAM arrives equal both ways.
//!
//! A paused QEMU with random bytes in RAM migrates to [`DestinationHooks`]; what arrived migrates with
//! [`SourceHooks`] to a second QEMU, whose RAM must equal the first one's. Device state is carried through as it
//! came. Needs an active device (see `verbs.rs`) and `qemu-system-x86_64`; `RDMA_HOOKS_QEMUS` names others, separated
//! by colons.

#![cfg(feature = "verbs")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv6Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::mapped::Mapped;
use common::{MIB, PAGE, Random, TestMemory};
use rdma_hooks::verbs::{PortState, VerbsFabric, devices};
use rdma_hooks::{
    BlockSpan, Cancel, DestinationConfig, DestinationHooks, Fabric, HookMark, HostRegion, PageContent,
    RamBlock, RamControl, RegionMemory, ReturnReader, ReturnWriter, SourceConfig, SourceHooks, Stop,
};

const RAM_MIB: u64 = 16;
const EOS: u64 = 0x10;
/// Command sections: open the return path; PING 1.
const OPEN_AND_PING: &[u8] = &[8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 0, 0, 0, 1];
const PONG_1: &[u8] = &[0, 2, 0, 4, 0, 0, 0, 1];
const SHUT_0: &[u8] = &[0, 1, 0, 4, 0, 0, 0, 0];

struct Qemu {
    child: Child,
    monitor: BufReader<UnixStream>,
}

impl Qemu {
    fn start(program: &Path, folder: &Path, name: &str, more: &[String]) -> Self {
        let socket = folder.join(format!("{name}.sock"));
        let qmp = format!("unix:{},server=on,wait=off", socket.display());
        let mut command = Command::new(program);
        command
            .args(["-accel", "tcg", "-M", "pc-i440fx-7.2", "-m", &RAM_MIB.to_string()])
            .args(["-S", "-nodefaults", "-display", "none", "-qmp", &qmp])
            .args(more)
            .stdin(Stdio::null());
        let child = command.spawn().expect("qemu starts");
        let until = Instant::now() + Duration::from_secs(60);
        let stream = loop {
            match UnixStream::connect(&socket) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(100)),
                Err(error) => panic!("monitor of {name}: {error}"),
            }
        };
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut qemu = Self { child, monitor: BufReader::new(stream) };
        qemu.ask(r#"{"execute":"qmp_capabilities"}"#);
        qemu
    }

    /// Executes a monitor command; returns the line that answers it.
    fn ask(&mut self, command: &str) -> String {
        self.monitor.get_mut().write_all(command.as_bytes()).unwrap();
        self.monitor.get_mut().write_all(b"\n").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.monitor.read_line(&mut line).unwrap() > 0, "qemu went away at {command}");
            if line.starts_with(r#"{"return""#) {
                return line;
            }
            assert!(!line.starts_with(r#"{"error""#), "{command}: {line}");
        }
    }

    fn enable(&mut self, capability: &str) {
        self.ask(&format!(
            r#"{{"execute":"migrate-set-capabilities","arguments":{{"capabilities":[{{"capability":"{capability}","state":true}}]}}}}"#
        ));
    }

    /// Waits until the migration is over.
    fn wait_completed(&mut self) {
        let until = Instant::now() + Duration::from_secs(120);
        loop {
            let status = self.ask(r#"{"execute":"query-migrate"}"#);
            if status.contains(r#""status": "completed""#) {
                return;
            }
            assert!(!status.contains("failed") && Instant::now() < until, "{status}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Guest memory but for the hole below 1 MiB, where devices and firmware are mapped.
    fn memory(&mut self, folder: &Path) -> Vec<u8> {
        let file = folder.join("memory");
        self.ask(&format!(
            r#"{{"execute":"pmemsave","arguments":{{"val":{MIB},"size":{},"filename":"{}"}}}}"#,
            (RAM_MIB - 1) * MIB,
            file.display()
        ));
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(file).unwrap();
        bytes
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a QEMU sent.
struct Captured {
    /// Machine name with its subsections: everything from the file header to the first section.
    configuration: Vec<u8>,
    section: [u8; 4],
    blocks: Vec<(String, u64)>,
    ram: HashMap<String, Arc<Mapped>>,
    /// Device state, end mark and description.
    tail: Vec<u8>,
}

impl Captured {
    fn ram_blocks(&self) -> Vec<RamBlock> {
        let block = |(name, _): &(String, u64)| RamBlock::new(name, HostRegion::new(self.ram[name].clone()));
        self.blocks.iter().map(block).collect()
    }
}

struct Reader<'a> {
    hooks: &'a mut DestinationHooks,
    stop: &'a Stop,
    seen: Vec<u8>,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let mut done = 0;
        while done < N {
            done += self.hooks.read_stream(&mut bytes[done..], self.stop).expect("stream");
        }
        self.seen.extend_from_slice(&bytes);
        bytes
    }

    fn string(&mut self, len: usize) -> String {
        (0..len).map(|_| char::from(self.take::<1>()[0])).collect()
    }
}

/// Takes a whole migration of a QEMU. `back` is the way back, if the QEMU opened one.
fn capture(hooks: &mut DestinationHooks, mut back: Option<ReturnWriter>, stop: &Stop) -> Captured {
    let mut ram = HashMap::new();
    let mut blocks = Vec::new();
    let mut reader = Reader { hooks, stop, seen: Vec::new() };
    assert_eq!(&reader.take::<9>(), b"QEVM\0\0\0\x03\x07");
    let len = u32::from_be_bytes(reader.take());
    reader.string(len as usize);
    let configuration = std::mem::take(&mut reader.seen);
    let mut kind = reader.take::<1>()[0];
    while kind == 8 {
        let [_, command, _, len] = reader.take::<4>();
        reader.string(usize::from(len));
        if let (2, Some(back)) = (command, &mut back) {
            back.write(PONG_1, stop).unwrap();
            back.flush(stop).unwrap();
        }
        kind = reader.take::<1>()[0];
    }
    assert_eq!(kind, 1, "START comes first");
    let section = reader.take::<4>();
    assert_eq!(reader.string(4), "\x03ram");
    assert_eq!(reader.take::<8>(), [0, 0, 0, 0, 0, 0, 0, 4]);
    let mut left = u64::from_be_bytes(reader.take());
    assert_eq!(left & 0xfff, 4, "sizes of blocks");
    left &= !0xfff;
    while left > 0 {
        let [len] = reader.take::<1>();
        let name = reader.string(usize::from(len));
        let length = u64::from_be_bytes(reader.take());
        let memory = Arc::new(Mapped::zeros(length));
        reader.hooks.add_block(RamBlock::new(&name, HostRegion::new(memory.clone()))).unwrap();
        assert_eq!(reader.hooks.block_notification(&name, length).unwrap() as usize, blocks.len());
        blocks.push((name.clone(), length));
        ram.insert(name, memory);
        left -= length;
    }
    loop {
        // Inside a section of "ram": rounds until its end.
        loop {
            match u64::from_be_bytes(reader.take()) {
                HookMark::FLAG => drop(reader.hooks.registration_handle(stop).expect("round")),
                EOS => break,
                other => panic!("record {other:#x} in a section of ram"),
            }
        }
        assert_eq!(reader.take::<1>(), [0x7e]);
        assert_eq!(reader.take::<4>(), section);
        if kind == 3 {
            break;
        }
        kind = reader.take::<1>()[0];
        assert!(matches!(kind, 2 | 3), "section type {kind}");
        assert_eq!(reader.take::<4>(), section);
    }
    let mut tail = Vec::new();
    let mut buffer = [0; 65536];
    while !ends_with_description(&tail) {
        let count = hooks.read_stream(&mut buffer, stop).expect("device state");
        tail.extend_from_slice(&buffer[..count]);
    }
    if let Some(mut back) = back {
        back.write(SHUT_0, stop).unwrap();
        let started = Instant::now();
        let parted = back.finish(stop).unwrap();
        println!("    return path closed after {:?} ({parted})", started.elapsed());
    }
    Captured { configuration, section, blocks, ram, tail }
}

/// The stream ends with an end mark and a description: 0, 6, its length, JSON.
fn ends_with_description(tail: &[u8]) -> bool {
    tail.last() == Some(&b'}')
        && tail.windows(7).enumerate().any(|(at, window)| {
            let len = u32::from_be_bytes(window[2..6].try_into().unwrap()) as usize;
            window[..2] == [0, 6] && window[6] == b'{' && at + 6 + len == tail.len()
        })
}

/// Sends what was captured to a waiting QEMU.
fn replay(captured: &Captured, mut hooks: SourceHooks, back: Option<ReturnReader>, stop: &Stop) {
    let total: u64 = captured.blocks.iter().map(|(_, length)| length).sum();
    let mut head = captured.configuration.clone();
    if back.is_some() {
        head.extend_from_slice(OPEN_AND_PING);
    }
    head.push(1);
    head.extend_from_slice(&captured.section);
    head.extend_from_slice(b"\x03ram\0\0\0\0\0\0\0\x04");
    head.extend_from_slice(&(total | 4).to_be_bytes());
    for (name, length) in &captured.blocks {
        head.push(name.len() as u8);
        head.extend_from_slice(name.as_bytes());
        head.extend_from_slice(&length.to_be_bytes());
    }
    hooks.set_blocks(captured.ram_blocks()).unwrap();
    hooks.write_stream(&head, stop).unwrap();
    for (kind, next) in
        [(RamControl::Setup, Some(2)), (RamControl::Round, Some(3)), (RamControl::Finish, None)]
    {
        let mark = hooks.registration_start(kind).unwrap().unwrap();
        hooks.write_stream(&mark.to_bytes(), stop).unwrap();
        for (index, (_, length)) in captured.blocks.iter().enumerate().filter(|_| kind != RamControl::Setup) {
            let (block, content) = (index as u32, PageContent::Unknown);
            // The last round sends a part again, as if the guest had touched it.
            let (offset, len) =
                if kind == RamControl::Round { (0, *length) } else { (0, (*length).min(MIB / 2)) };
            hooks.control_save_page(BlockSpan { block, offset, len, content }, stop).unwrap();
        }
        hooks.registration_stop(kind, stop).unwrap();
        hooks.write_stream(&EOS.to_be_bytes(), stop).unwrap();
        hooks.write_stream(&[0x7e], stop).unwrap();
        hooks.write_stream(&captured.section, stop).unwrap();
        if let Some(next) = next {
            hooks.write_stream(&[next], stop).unwrap();
            hooks.write_stream(&captured.section, stop).unwrap();
        }
    }
    hooks.write_stream(&captured.tail, stop).unwrap();
    println!("    sent: {:?}", hooks.counters());
    if let Some(mut back) = back {
        hooks.flush_stream(stop).unwrap();
        let mut answers = Vec::new();
        while !answers.ends_with(SHUT_0) {
            let mut buffer = [0; 64];
            let count = back.read(&mut buffer, stop).expect("return path");
            answers.extend_from_slice(&buffer[..count]);
        }
        assert!(answers.starts_with(PONG_1), "{answers:?}");
    }
    let started = Instant::now();
    assert!(hooks.finish(stop).expect("end"), "the QEMU closes when it has loaded");
    println!("    closed after {:?}", started.elapsed());
}

fn address() -> Option<String> {
    let devices = devices().ok()?;
    let active =
        devices.iter().flat_map(|device| &device.ports).filter(|port| port.state == PortState::Active);
    let mut gids = active.flat_map(|port| &port.gids).map(|gid| Ipv6Addr::from(*gid));
    gids.find_map(|gid| gid.to_ipv4_mapped()).map(|ip| ip.to_string())
}

fn qemus() -> Vec<PathBuf> {
    match std::env::var("RDMA_HOOKS_QEMUS") {
        Ok(list) => list.split(':').map(PathBuf::from).collect(),
        Err(_) => vec!["qemu-system-x86_64".into()],
    }
}

struct Case {
    name: &'static str,
    pin_all: bool,
    return_path: bool,
}

fn there_and_back(program: &Path, address: &str, case: &Case) {
    let folder = std::env::temp_dir().join(format!("rdma-hooks-qemu-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let image = folder.join("image");
    let mut random = Random(42);
    let bytes: Vec<u8> = (0..3 * MIB / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    std::fs::write(&image, &bytes).unwrap();
    let loader = format!("loader,file={},addr={},force-raw=on", image.display(), 2 * MIB + 3 * PAGE);
    let more = ["-device".to_owned(), loader];

    let fabric = VerbsFabric::open().unwrap();
    let stop = Stop::new(Some(fabric.now() + Duration::from_secs(100)), Cancel::default());
    let mut listener = fabric.listen(address, 0).unwrap();
    let uri = format!("rdma:{address}:{}", listener.port());
    let mut source = Qemu::start(program, &folder, "source", &more);
    let before = source.memory(&folder);
    assert_eq!(before[(MIB + 3 * PAGE) as usize..][..bytes.len()], bytes, "the image is in RAM");
    for (wanted, capability) in [(case.pin_all, "rdma-pin-all"), (case.return_path, "return-path")] {
        if wanted {
            source.enable(capability);
        }
    }
    let captured = std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut hooks =
                DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop).unwrap();
            assert_eq!(hooks.granted().pin_all, case.pin_all);
            let back = case
                .return_path
                .then(|| ReturnWriter::accept(listener.as_mut(), &hooks.granted().clone(), &stop).unwrap());
            let captured = capture(&mut hooks, back, &stop);
            println!("    received: {:?}", hooks.counters());
            let started = Instant::now();
            let parted = hooks.finish(&stop).unwrap();
            println!("    closed after {:?} ({parted})", started.elapsed());
            captured
        });
        source.ask(&format!(r#"{{"execute":"migrate","arguments":{{"uri":"{uri}"}}}}"#));
        destination.join().unwrap()
    });
    source.wait_completed();
    println!("    QEMU is done with sending");
    let mut arrived = vec![0; before.len()];
    captured.ram["pc.ram"].read(MIB, &mut arrived);
    assert!(arrived == before, "{}: RAM that arrived here differs", case.name);
    drop(source);

    let port = 4480;
    let mut target = Qemu::start(program, &folder, "target", &["-incoming".to_owned(), "defer".to_owned()]);
    if case.return_path {
        target.enable("return-path");
    }
    target.ask(&format!(r#"{{"execute":"migrate-incoming","arguments":{{"uri":"rdma:{address}:{port}"}}}}"#));
    let config = SourceConfig { pin_all: case.pin_all, ..SourceConfig::default() };
    let hooks = SourceHooks::connect(&fabric, address, port, config, &stop).unwrap();
    let back = case.return_path.then(|| hooks.open_return_path(&fabric, &stop).unwrap());
    replay(&captured, hooks, back, &stop);
    target.wait_completed();
    assert!(target.memory(&folder) == before, "{}: RAM at the second QEMU differs", case.name);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn r51_r52_qemu_to_here_to_qemu_leaves_equal_memory() {
    let Some(address) = address() else {
        assert!(std::env::var_os("RDMA_HOOKS_NEED_DEVICE").is_none(), "no device");
        println!("skipped: no device has an active port with an IPv4 address");
        return;
    };
    for program in qemus() {
        let version = Command::new(&program).arg("--version").output().expect("qemu").stdout;
        let version = String::from_utf8_lossy(&version).lines().next().unwrap_or_default().to_owned();
        let cases = [
            Case { name: "dynamic", pin_all: false, return_path: false },
            Case { name: "pin-all", pin_all: true, return_path: false },
            Case { name: "return path", pin_all: false, return_path: true },
        ];
        for case in cases {
            // Without postcopy, QEMU 7.2 has no return path over RDMA.
            if (case.return_path && version.contains("version 7."))
                || std::env::var("RDMA_HOOKS_CASE").is_ok_and(|only| only != case.name)
            {
                continue;
            }
            let started = Instant::now();
            println!("{version}, {}", case.name);
            there_and_back(&program, &address, &case);
            println!("    {:?}", started.elapsed());
        }
    }
}
