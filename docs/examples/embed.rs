//! A VMM that moves its guest: memory it mapped, a dirty bitmap it keeps, its own pause and resume.
//!
//! Both ends run in this process, connected by a socket pair. `cargo run --example embed`
#![allow(clippy::expect_used)]

use std::error::Error;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use ramwire::guest::{DeviceState, GuestControl, GuestMemory, MappedGuest, SoftwareBitmap};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    Configuration, DestinationConnection, DestinationGuest, DestinationReport, DestinationSession,
    DestinationSettings, MigrationHandle, SourceConnection, SourceGuest, SourceReport, SourceSession,
    SourceSettings,
};
use ramwire::sys::Mapping;
use ramwire::transport::{StreamChannel, StreamOptions};
use ramwire::units::{BlockIndex, BlockOffset, PageSize};

const RAM_BYTES: u64 = 64 << 20;
const PAGE_BYTES: u64 = 4096;

/// A machine with one vCPU, which writes the number of its step into one page after the other.
#[derive(Clone)]
struct Machine {
    memory: Arc<MappedGuest>,
    written: Arc<SoftwareBitmap>,
    vcpu: Arc<Mutex<Vcpu>>,
}

#[derive(Default)]
struct Vcpu {
    runs: bool,
    step: u64,
}

impl Machine {
    fn new() -> Result<Self, Box<dyn Error>> {
        let ram = Mapping::memfd("ram", RAM_BYTES)?;
        let block = RamBlock::new(BlockName::new("ram")?, RAM_BYTES);
        let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build()?;
        let written = SoftwareBitmap::new(memory.table());
        Ok(Self { memory: Arc::new(memory), written: Arc::new(written), vcpu: Arc::default() })
    }

    fn vcpu(&self) -> MutexGuard<'_, Vcpu> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU's thread. It holds the lock while it writes, so no write is under way after a pause.
    fn run(&self) {
        loop {
            let mut vcpu = self.vcpu();
            if !vcpu.runs {
                return;
            }
            vcpu.step += 1;
            self.write(BlockOffset(vcpu.step * PAGE_BYTES % RAM_BYTES), vcpu.step);
            drop(vcpu);
            thread::sleep(Duration::from_micros(20));
        }
    }

    fn write(&self, at: BlockOffset, value: u64) {
        let bytes = value.to_le_bytes();
        let landing = self.memory.table().admit(BlockIndex(0), at, bytes.len() as u64).expect("in the block");
        self.memory.span(landing).expect("mapped").copy_from(&bytes);
        // After the bytes: a page that is marked first may be sent with its old bytes, and never again.
        self.written.mark(landing);
    }
}

impl GuestControl for Machine {
    fn pause(&mut self) -> io::Result<()> {
        self.vcpu().runs = false;
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        self.vcpu().runs = true;
        let machine = self.clone();
        thread::Builder::new().name("vcpu".into()).spawn(move || machine.run())?;
        Ok(())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Machine {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.vcpu().step.to_le_bytes())
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut step = [0; 8];
        from.read_exact(&mut step)?;
        self.vcpu().step = u64::from_le_bytes(step);
        Ok(())
    }
}

fn send(machine: Machine, socket: UnixStream) -> Result<MigrationHandle<SourceReport>, Box<dyn Error>> {
    let channel = StreamChannel::from_fd(socket.into(), "destination", &StreamOptions::default())?;
    let connection = SourceConnection::over(channel, machine.memory.clone());
    let guest = SourceGuest {
        memory: machine.memory.clone(),
        dirty: vec![machine.written.clone()], // every source that knows of writes; all are merged
        control: Box::new(machine),
    };
    let settings = SourceSettings::new(Configuration::default());
    Ok(SourceSession::new(guest, connection, settings).spawn()?)
}

fn receive(
    machine: Machine,
    socket: UnixStream,
) -> Result<MigrationHandle<DestinationReport>, Box<dyn Error>> {
    let channel = StreamChannel::from_fd(socket.into(), "source", &StreamOptions::default())?;
    let connection = DestinationConnection::over(channel);
    let guest = DestinationGuest { memory: Box::new(machine.memory.clone()), control: Box::new(machine) };
    let settings = DestinationSettings::default();
    Ok(DestinationSession::new(guest, connection, settings).spawn()?)
}

pub(crate) fn main() -> Result<(), Box<dyn Error>> {
    let (mut here, there) = (Machine::new()?, Machine::new()?);
    here.resume()?;
    let (near, far) = UnixStream::pair()?;

    let destination = receive(there, far)?;
    let source = send(here, near)?;
    while !source.is_finished() {
        let progress = source.progress();
        println!("round {}: {} bytes left", progress.rounds.len(), progress.remaining);
        thread::sleep(Duration::from_millis(20));
    }

    let (sent, received) = (source.wait()?, destination.wait()?);
    println!("{:?} here, {:?} there", sent.outcome, received.ending);
    match sent.error {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}
