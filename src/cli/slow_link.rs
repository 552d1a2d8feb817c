//! A link with a limited rate, on a machine whose loopback is thousands of times faster: TCP connections pass through
//! this process and are delayed. Only the direction towards the destination is limited.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ramwire::units::Rate;
use socket2::SockRef;

/// Amount that one step carries, as time at the rate.
const STEP: Duration = Duration::from_millis(1);
/// How much waiting bytes catch up if this thread was late: a wire would not have been late.
const LATE: Duration = Duration::from_millis(50);
/// A read that took longer had to wait for bytes: the link was idle.
const IDLE: Duration = Duration::from_millis(1);
/// Maximum number of bytes inside the link: few, as in a switch.
const INSIDE: usize = 128 << 10;

/// The link. Dropping it ends it for new connections; existing ones end with their ends.
#[derive(Debug)]
pub(super) struct SlowLink {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Until when the bytes so far occupy the wire; all connections share it.
type Busy = Arc<Mutex<Instant>>;

impl SlowLink {
    /// A link to `far`, reached at [`address`](Self::address).
    ///
    /// # Errors
    /// The kernel's error for a socket or a thread.
    pub(super) fn to(far: SocketAddr, rate: Rate) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        SockRef::from(&listener).set_recv_buffer_size(INSIDE)?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let (busy, over) = (Arc::new(Mutex::new(Instant::now())), ended.clone());
        let accept = move || {
            while let Ok((near, _)) = listener.accept() {
                if over.load(Ordering::Acquire) {
                    return;
                }
                if let Err(error) = join(near, far, rate, busy.clone()) {
                    tracing::warn!(%error, "a connection through the slow link could not be made");
                }
            }
        };
        let thread = Some(std::thread::Builder::new().name("slow-link".into()).spawn(accept)?);
        Ok(Self { address, ended, thread })
    }

    /// Where it is entered.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for SlowLink {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        // Wakes it; a listener that is already gone has ended by itself.
        if TcpStream::connect(self.address).is_ok()
            && let Some(thread) = self.thread.take()
        {
            drop(thread.join());
        }
    }
}

fn join(near: TcpStream, far: SocketAddr, rate: Rate, busy: Busy) -> io::Result<()> {
    let far = TcpStream::connect(far)?;
    [&near, &far].into_iter().try_for_each(|end| end.set_nodelay(true))?;
    SockRef::from(&far).set_send_buffer_size(INSIDE)?;
    let back = (far.try_clone()?, near.try_clone()?);
    let thread = |name: &str| std::thread::Builder::new().name(name.into());
    thread("slow-link-there").spawn(move || carry(near, far, Some((rate, busy))))?;
    thread("slow-link-back").spawn(move || carry(back.0, back.1, None))?;
    Ok(())
}

/// Carries bytes until either end closes; then closes the other.
fn carry(mut from: TcpStream, mut into: TcpStream, limit: Option<(Rate, Busy)>) {
    let step = limit.as_ref().map_or(INSIDE, |(rate, _)| rate.bytes_in(STEP) as usize);
    let mut bytes = vec![0; step.clamp(1500, INSIDE)];
    loop {
        let asked = Instant::now();
        let Ok(count @ 1..) = from.read(&mut bytes) else { break };
        if let Some((rate, busy)) = &limit {
            let came = Instant::now();
            let wait = {
                let mut busy = busy.lock().unwrap_or_else(PoisonError::into_inner);
                let idle = came.duration_since(asked) > IDLE;
                let earliest = if idle { came } else { came.checked_sub(LATE).unwrap_or(came) };
                *busy = (*busy).max(earliest) + rate.time_for(count as u64).unwrap_or_default();
                busy.saturating_duration_since(came)
            };
            std::thread::sleep(wait);
        }
        if into.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    // Ends that are gone need no closing.
    let _ = (into.shutdown(Shutdown::Write), from.shutdown(Shutdown::Read));
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// The output equals the input, in both directions, and does not arrive earlier than the rate allows.
    #[test]
    fn bytes_pass_whole_and_take_their_time() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let link = SlowLink::to(listener.local_addr().unwrap(), Rate(10 << 20)).unwrap();
        let near = TcpStream::connect(link.address()).unwrap();
        let (mut far, _) = listener.accept().unwrap();
        let sent: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
        let began = Instant::now();
        let answer = std::thread::scope(|scope| {
            scope.spawn(|| {
                (&near).write_all(&sent).unwrap();
                near.shutdown(Shutdown::Write).unwrap();
            });
            let mut came = Vec::new();
            far.read_to_end(&mut came).unwrap();
            assert!(came == sent, "{} of {} bytes", came.len(), sent.len());
            far.write_all(b"got it").unwrap();
            drop(far);
            let mut answer = String::new();
            (&near).read_to_string(&mut answer).unwrap();
            answer
        });
        assert_eq!(answer, "got it");
        assert!(began.elapsed() >= Duration::from_millis(90), "1 MiB at 10 MiB/s took {:?}", began.elapsed());
    }
}
