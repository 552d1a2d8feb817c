//! The machine around one side's memory, and what must hold whenever it is stopped, saved, loaded and started.

use std::io::{self, Read, Write};

use super::{PAGE, page_of};
use crate::guest::{DeviceState, GuestControl};
use crate::session::sim::plan::{Fault, Side, Started};
use crate::session::sim::world::{Sim, World};
use crate::stream::qemu::section::{
    SectionName, encode_eof, encode_footer, encode_full, encode_vm_description,
};
use crate::units::Percent;

impl World {
    /// An unplugged page with contents at the destination, where a ramwire was informed of it.
    fn stale_page(&self) -> Option<(u32, u64)> {
        if !self.ready || self.plan.watched {
            return None;
        }
        let mut now = vec![0; PAGE];
        self.guest.nothing[0].unplugged.iter().copied().find(|(block, page)| {
            page_of(&self.guest.memory[1], *block, *page).copy_to(&mut now);
            now.iter().any(|byte| *byte != 0)
        })
    }
}

/// The machine around one side's memory.
pub(in crate::session::sim) struct SimControl {
    pub(in crate::session::sim) sim: Sim,
    pub(in crate::session::sim) side: Side,
}

fn failed<T>(world: &mut World) -> io::Result<T> {
    assert!(!world.panics(), "as the plan wants it");
    Err(io::Error::other("as the plan wants it"))
}

impl SimControl {
    fn may_resume(&self, world: &mut World) {
        if world.guest.running[self.side.other() as usize] {
            world.violation(format!(
                "the guest is started at {:?} while it runs on the other side",
                self.side
            ));
        }
        if self.side == Side::Source {
            if world.commit.is_some() && !world.refused {
                world.violation("the source's guest was resumed after COMMIT");
            }
        } else {
            if !world.commit_read {
                world.violation("the destination's guest was started before COMMIT was received");
            }
            if let Some(page) = world.stale_page() {
                world.violation(format!("{page:?} is unplugged and has an earlier state"));
            }
            if world.guest.loaded != world.guest.state {
                world.violation("the guest is started with another device state");
            }
        }
        if let Some(page) = world.guest.differs(self.side, Side::Source) {
            world.violation(format!("started with other memory: {page}"));
        }
    }
}

impl GuestControl for SimControl {
    fn pause(&mut self) -> io::Result<()> {
        let mut turn = self.sim.enter();
        if self.side == Side::Target {
            // Stopped again: its start panicked.
            if turn.world.plan.started == Started::RunsOn {
                return Err(io::Error::other("as the plan wants it"));
            }
            turn.world.guest.running[1] = false;
            return Ok(());
        }
        turn.world.pause_begins();
        if turn.world.fails(|fault| matches!(fault, Fault::Pause { .. })) {
            let stands = turn.world.plan.fault == Some(Fault::Pause { stands: true });
            turn.world.guest.running[0] = !stands;
            return failed(&mut turn.world);
        }
        turn.world.guest.running[0] = false;
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        let mut turn = self.sim.enter();
        if self.side == Side::Target && turn.world.killed {
            return Err(io::Error::other("its host is dead"));
        }
        self.may_resume(&mut turn.world);
        let side = self.side;
        let not_resumed = side == Side::Source && turn.world.plan.not_resumed;
        let fails = side == Side::Target && turn.world.fails(|fault| *fault == Fault::Start);
        let may_run = turn.world.plan.panics && turn.world.plan.started != Started::Not;
        if not_resumed || fails && !may_run {
            return failed(&mut turn.world);
        }
        turn.world.guest.running[side as usize] = true;
        if side == Side::Target {
            turn.world.ran_there = true;
            turn.world.guest.truth[1] = turn.world.guest.truth[0].clone();
            turn.world.guest.nothing[1] = turn.world.guest.nothing[0].clone();
            // Enough to see a page that is placed too late.
            turn.world.guest.writes_left += 40;
        }
        if fails {
            return failed(&mut turn.world);
        }
        turn.step();
        Ok(())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    fn forbid_discard(&mut self, forbid: bool) -> bool {
        let mut turn = self.sim.enter();
        if !forbid && turn.world.link.registered && self.side == Side::Source {
            turn.world.violation("the promise is given back while a NIC knows the memory");
        }
        if self.side == Side::Source {
            turn.world.guest.promised = forbid;
        }
        true
    }

    fn throttle(&mut self, share: Percent) {
        self.sim.enter().world.throttle = share.get();
    }
}

impl DeviceState for SimControl {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let mut turn = self.sim.enter();
        if turn.world.guest.running[0] {
            turn.world.violation("device state was saved of a running guest");
        }
        if turn.world.fails(|fault| *fault == Fault::Save) {
            return failed(&mut turn.world);
        }
        let mut payload = turn.world.guest.stamp.to_be_bytes().to_vec();
        for _ in 0..turn.world.plan.state_bytes {
            payload.push(turn.world.rng.next() as u8);
        }
        let (state, end) = device_state(&payload);
        out.write_all(&state)?;
        (turn.world.guest.state, turn.world.guest.state_end) = (state, end);
        Ok(())
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut turn = self.sim.enter();
        turn.world.guest.loaded.clear();
        from.read_to_end(&mut turn.world.guest.loaded)?;
        turn.world.load_touches();
        if turn.world.killed || turn.world.fails(|fault| *fault == Fault::Load) {
            return failed(&mut turn.world);
        }
        Ok(())
    }

    fn loads_again(&self) -> bool {
        true
    }
}

/// One device section with its description, as a QEMU would end its stream; and where the sections end.
fn device_state(payload: &[u8]) -> (Vec<u8>, usize) {
    let mut out = Vec::new();
    encode_full(&SectionName { id: 9, idstr: "dev", instance: 0, version: 1 }, &mut out);
    out.extend_from_slice(payload);
    encode_footer(9, &mut out);
    let end = out.len();
    encode_eof(&mut out);
    let json = format!(
        r#"{{"devices": [{{"name": "dev", "instance_id": 0, "vmsd_name": "d", "fields": [{{"size": {}}}]}}]}}"#,
        payload.len()
    );
    encode_vm_description(json.as_bytes(), &mut out);
    (out, end)
}
