//! What was done to a file, and what a crash may have left of it.

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use crate::transport::Random;

/// One operation.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write {
        at: u64,
        bytes: Vec<u8>,
    },
    Punch {
        at: u64,
        len: u64,
    },
    Cut {
        len: u64,
    },
    /// All before it is on the disk.
    Synced,
}

thread_local! {
    static WANTED: Cell<bool> = const { Cell::new(false) };
}

/// Files that this thread opens keep a journal from here on, or no longer.
pub(super) fn want(wanted: bool) {
    WANTED.set(wanted);
}

/// The journal of one file, if it keeps one.
#[derive(Debug)]
pub(super) struct Journal(Option<Mutex<Vec<Op>>>);

impl Journal {
    pub(super) fn new() -> Self {
        Self(WANTED.get().then(Mutex::default))
    }

    pub(super) fn add(&self, op: impl FnOnce() -> Op) {
        if let Some(ops) = &self.0 {
            ops.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(op());
        }
    }

    pub(super) fn ops(&self) -> Vec<Op> {
        self.0
            .as_ref()
            .map(|ops| ops.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone())
            .unwrap_or_default()
    }
}

/// Does to `file` what a crash after the operation number `crash` may leave of `ops`: all up to the last sync before it; of
/// those behind, each or none or its first sectors, whatever their order.
pub(super) fn crash(file: &File, ops: &[Op], crash: usize, random: &mut Random) {
    let done = &ops[..crash];
    let synced = done.iter().rposition(|op| matches!(op, Op::Synced)).map_or(0, |at| at + 1);
    done[..synced].iter().for_each(|op| apply(file, op, usize::MAX));
    for op in &done[synced..] {
        match random.draw() % 4 {
            0 => {}
            1 => apply(file, op, (random.draw() % 9) as usize * 512),
            _ => apply(file, op, usize::MAX),
        }
    }
}

/// Of a write the first `most` bytes.
fn apply(file: &File, op: &Op, most: usize) {
    let done = match op {
        Op::Write { at, bytes } => file.write_all_at(&bytes[..bytes.len().min(most)], *at),
        Op::Punch { at, len } => {
            let end = at + (*len).min(most as u64);
            let len = file.metadata().map_or(0, |meta| meta.len()).min(end).saturating_sub(*at);
            file.write_all_at(&vec![0; len as usize], *at)
        }
        Op::Cut { len } => file.set_len(*len),
        Op::Synced => Ok(()),
    };
    done.unwrap_or_else(|error| panic!("{op:?}: {error}"));
}
