//! A VMM that moves its guest: memory it mapped, a dirty bitmap it keeps, its own pause and resume.
#![allow(clippy::unwrap_used)]
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};

use ramwire::guest::{GuestControl, GuestMemory, MappedGuest, SoftwareBitmap};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::*;
use ramwire::units::{BlockIndex, BlockOffset, PageSize};

const RAM: u64 = 64 << 20;

/// One vCPU, which writes its step's number into one page after the other: does it run, and its step.
#[derive(Clone)]
struct Machine(Arc<MappedGuest>, Arc<SoftwareBitmap>, Arc<Mutex<(bool, u64)>>);

impl Machine {
    fn new() -> Self {
        let ram = ramwire::sys::Mapping::memfd("ram", RAM).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), RAM);
        let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap();
        let written = SoftwareBitmap::new(memory.table());
        Self(Arc::new(memory), Arc::new(written), Arc::default())
    }
    fn run(&self) {
        while let Some(mut cpu) = Some(self.2.lock().unwrap()).filter(|cpu| cpu.0) {
            cpu.1 += 1;
            let page = self.0.table().admit(BlockIndex(0), BlockOffset(cpu.1 * 4096 % RAM), 8).unwrap();
            self.0.span(page).unwrap().copy_from(&cpu.1.to_le_bytes());
            self.1.mark(page); // First the bytes, then the mark.
            drop(cpu);
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
    }
}

impl GuestControl for Machine {
    fn pause(&mut self) -> io::Result<()> {
        self.2.lock().unwrap().0 = false; // The vCPU holds the lock while it writes: none does when this returns.
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        let vcpu = self.clone();
        vcpu.2.lock().unwrap().0 = true;
        std::thread::Builder::new().spawn(move || vcpu.run()).map(drop)
    }
    fn device_state_bytes(&mut self) -> u64 {
        8 // Counts against the downtime.
    }
    fn save_devices(&mut self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.2.lock().unwrap().1.to_le_bytes())
    }
    fn load_devices(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut step = [0; 8];
        from.read_exact(&mut step).map(|()| self.2.lock().unwrap().1 = u64::from_le_bytes(step))
    }
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut here, there) = (Machine::new(), Machine::new());
    here.resume()?;
    let (near, far) = std::os::unix::net::UnixStream::pair()?;
    let channel = |fd| ramwire::transport::StreamChannel::from_fd(fd, "peer", &Default::default());
    let (memory, control) = (Box::new(there.0.clone()), Box::new(there));
    let (near, far) = (channel(near.into())?, channel(far.into())?);
    let arriving = DestinationSession::over(far, memory, control, Default::default()).spawn()?;
    let link = SourceConnection::over(near, here.0.clone());
    let guest = SourceGuest { memory: here.0.clone(), dirty: vec![here.1.clone()], control: Box::new(here) };
    let leaving = SourceSession::new(guest, link, SourceSettings::new(Default::default())).spawn()?;
    while !leaving.is_finished() {
        let now = leaving.progress();
        println!("round {}: {} bytes left", now.rounds.len(), now.remaining);
        let _ = (now.total_time > 30e3).then(|| leaving.cancel()); // The report tells how it ended.
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let (left, arrived) = (leaving.wait()?, arriving.wait()?);
    println!("{:?} here, {:?} there", left.outcome, arrived.ending);
    left.error.map_or(Ok(()), |error| Err(error.into()))
}
