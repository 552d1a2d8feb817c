//! A standby of a QEMU's checkpoints, given bytes.

use super::*;
use crate::stream::qemu::colo::samples::{devices, first, ram, ram_sent, requested, sending, whole};
use crate::stream::qemu::colo::{ColoMessage, encode_size};
use crate::stream::qemu::section::{encode_end, encode_eof};

/// The memory of the samples' guest, with old bytes.
fn samples_memory() -> Arc<MappedGuest> {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), 8 * 4096);
    let mapping = Mapping::anonymous(8 * 4096).unwrap();
    mapping.region().span(0, 8 * 4096).unwrap().copy_from(&[9; 8 * 4096]);
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap())
}

/// Pages that the last checkpoint has made zero.
fn zero_pages(memory: &MappedGuest) -> Vec<usize> {
    let is_zero = |(at, page): (usize, &[u8])| page.iter().all(|byte| *byte == 0).then_some(at);
    bytes(memory).chunks(4096).enumerate().filter_map(is_zero).collect()
}

struct Lost(WhenLost);

impl StandbyObserver for Lost {
    fn lost(&mut self, _number: u64) -> WhenLost {
        self.0
    }
}

/// The end of a standby that was sent `sent` and then lost its primary, with its memory and what it answered.
fn kept(sent: &[u8], settings: StandbySettings) -> (StandbyReport, Arc<MappedGuest>, TestMachine, Vec<u8>) {
    let (near, far) = UnixStream::pair().unwrap();
    let (memory, machine) = (samples_memory(), TestMachine::default());
    let guest = DestinationGuest { memory: Box::new(memory.clone()), control: Box::new(machine.clone()) };
    let standby = StandbySession::of_qemu(guest, channel(far), settings);
    let standby = standby.with_observer(Box::new(Lost(WhenLost::Start))).spawn().unwrap();
    // It may have refused already.
    let _ = (&near).write_all(sent);
    near.shutdown(std::net::Shutdown::Write).unwrap();
    let mut answers = Vec::new();
    let _ = (&near).read_to_end(&mut answers);
    (standby.wait().unwrap(), memory, machine, answers)
}

fn words(messages: &[ColoMessage]) -> Vec<u8> {
    messages.iter().flat_map(|message| message.encode()).collect()
}

/// Wherever the bytes end: the memory and the device state are those of the last whole checkpoint.
#[test]
fn a_guest_of_a_qemu_starts_from_the_last_whole_checkpoint_wherever_its_bytes_end() {
    use ColoMessage::{Loaded, Ready, Received, Reply};
    let (one, two) = (first(), requested(whole()));
    for cut in (0..two.len()).step_by(7).chain([one.len() - 1, one.len(), two.len() - 5, two.len() - 4]) {
        let (report, memory, machine, answers) = kept(&two[..cut], StandbySettings::default());
        let last = u64::from(cut >= one.len()) + u64::from(cut >= two.len() - 4);
        assert_eq!(report.last, last, "{cut} bytes: {:?}", report.error);
        if last == 0 {
            assert!(
                !machine.runs() && matches!(report.ending, StandbyEnding::Nothing | StandbyEnding::Discarded)
            );
            continue;
        }
        assert_eq!((report.ending, machine.runs()), (StandbyEnding::Active(last), true), "{cut} bytes");
        let due = if last == 1 { &[0, 1, 2, 3][..] } else { &[0, 1, 2, 3, 7] };
        assert_eq!(zero_pages(&memory), due, "{cut} bytes");
        let mut state = Vec::new();
        devices(&mut state);
        assert!(machine.state().starts_with(&state) && machine.state().len() > state.len(), "{cut} bytes");
        let said = words(&[Ready, Reply, Received, Loaded]);
        assert!(said.starts_with(&answers), "{cut} bytes: {answers:?}");
        assert_eq!(answers.len() >= 16, last == 2, "{cut} bytes: {answers:?}");
    }
}

/// Its memory is that of the last whole checkpoint all the same.
#[test]
fn what_is_no_checkpoint_of_a_qemu_is_refused_by_name() {
    let behind = |add: &dyn Fn(&mut Vec<u8>)| {
        let mut out = whole();
        add(&mut out);
        out
    };
    let stateless = |state: &[u8]| {
        let mut out = behind(&|out| {
            *out = requested(std::mem::take(out));
            out.extend_from_slice(&ColoMessage::Send.encode());
            ram(out, encode_end, &[4]);
            encode_eof(out);
        });
        encode_size(state.len() as u64, &mut out);
        [&out[..], state].concat()
    };
    let cases = [
        (
            behind(&|out| out.extend_from_slice(&ColoMessage::Send.encode())),
            "VMSTATE_SEND is not legal here",
            2,
        ),
        (behind(&|out| out.extend_from_slice(&[0xff; 4])), "of COLO does not exist", 2),
        (behind(&|out| out.extend_from_slice(b"QEVM")), "of COLO does not exist", 2),
        (sending().into_iter().chain([0x55]).collect(), "begins nothing that is legal", 1),
        (ram_sent().into_iter().chain(ColoMessage::Request.encode()).collect(), "CHECKPOINT_REQUEST", 1),
        (stateless(b""), "device state that are no sections", 2),
        (stateless(b"\x04 no sections at all"), "device state that are no sections", 2),
        (b"QEVX\0\0\0\x03".to_vec(), "this is no migration stream", 0),
    ];
    for (bytes, due, last) in cases {
        let (report, memory, machine, _) = kept(&bytes, StandbySettings::default());
        let text = report.error.map(|error| Chain(&error).to_string()).unwrap_or_default();
        assert!(text.contains(due), "{due}: {text}");
        assert_eq!((report.last, machine.runs()), (last, last > 0), "{due}: {text}");
        let zeros = [&[][..], &[0, 1, 2, 3], &[0, 1, 2, 3, 7]][last as usize];
        assert_eq!(zero_pages(&memory), zeros, "{due}");
    }
}

#[test]
fn announced_sizes_are_bounded() {
    let mut large = ram_sent();
    encode_size((64 << 20) + 1, &mut large);
    let (report, ..) = kept(&large, StandbySettings::default());
    let text = Chain(&report.error.unwrap()).to_string();
    assert!(text.contains("the length of the device state"), "{text}");
    let small = StandbySettings { max_ram: 7 * 4096, ..StandbySettings::default() };
    let (report, ..) = kept(&first(), small);
    let text = Chain(&report.error.unwrap()).to_string();
    assert!(text.contains("has 32768 bytes of RAM, and 28672 are accepted"), "{text}");
}

/// The primary's guest is paused meanwhile: a checkpoint of which nothing more comes ends, and the guest is that of the
/// one before.
#[test]
fn a_checkpoint_that_does_not_end_is_given_up_by_name() {
    let (near, far) = UnixStream::pair().unwrap();
    let (memory, machine) = (samples_memory(), TestMachine::default());
    let guest = DestinationGuest { memory: Box::new(memory.clone()), control: Box::new(machine.clone()) };
    let timeout = std::time::Duration::from_millis(200);
    let settings = StandbySettings { checkpoint_timeout: timeout, ..StandbySettings::default() };
    let standby = StandbySession::of_qemu(guest, channel(far), settings);
    let standby = standby.with_observer(Box::new(Lost(WhenLost::Start))).spawn().unwrap();
    (&near).write_all(&ram_sent()).unwrap();
    let report = standby.wait().unwrap();
    let text = Chain(&report.error.unwrap()).to_string();
    assert!(text.contains("a checkpoint did not end within 0.2 s"), "{text}");
    assert_eq!((report.ending, zero_pages(&memory)), (StandbyEnding::Active(1), vec![0, 1, 2, 3]));
    assert!(machine.runs());
}

/// Between checkpoints a primary may rest for as long as it likes, and a command ends the wait.
#[test]
fn a_command_ends_the_wait_between_and_in_checkpoints() {
    for sent in [first(), ram_sent(), whole()] {
        let (near, far) = UnixStream::pair().unwrap();
        let (memory, machine) = (samples_memory(), TestMachine::default());
        let guest = DestinationGuest { memory: Box::new(memory.clone()), control: Box::new(machine.clone()) };
        let standby =
            StandbySession::of_qemu(guest, channel(far), StandbySettings::default()).spawn().unwrap();
        (&near).write_all(&sent).unwrap();
        // READY: the first is applied. For the second it is LOADED.
        let answers = if sent == whole() { 16 } else { 4 };
        (&near).read_exact(&mut vec![0; answers]).unwrap();
        standby.control().activate();
        let report = standby.wait().unwrap();
        let last = if sent == whole() { 2 } else { 1 };
        assert_eq!(report.ending, StandbyEnding::Active(last), "{:?}", report.error);
        assert!(machine.runs());
    }
}
