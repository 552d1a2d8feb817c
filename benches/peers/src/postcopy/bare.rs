//! A handler of missing pages without an engine: a fault, a request over TCP, the page, and it is placed.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use ramwire::observe::{Latency, LatencySummary};
use ramwire::sys::{CancelToken, Mapping, MissingFaults, Stop};
use ramwire::units::PageSize;
use rustix::event::PollFlags;

use super::{memory, page_at};
use crate::BenchError;

fn failed(doing: &'static str) -> impl Fn(std::io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the bare handler".into(), doing, source }
}

/// Touches every page with so many threads; from the report of each fault to its page in place.
///
/// # Errors
/// [`BenchError`].
pub fn run(source: &Mapping, threads: usize) -> Result<LatencySummary, BenchError> {
    let pages = source.region().len() / 4096;
    let here = memory(pages * 4096)?;
    let missing = MissingFaults::new().map_err(|error| BenchError::Refused {
        who: "this host".into(),
        what: "a userfaultfd".into(),
        answer: error.to_string(),
    })?;
    let whole = here.region().span(0, pages * 4096).map_err(|_| out_of_memory())?;
    missing.register(whole).map_err(|error| BenchError::Refused {
        who: "this host".into(),
        what: "to register memory".into(),
        answer: error.to_string(),
    })?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(failed("listening"))?;
    let address = listener.local_addr().map_err(failed("listening"))?;
    let mut asks = TcpStream::connect(address).map_err(failed("connecting"))?;
    let (answers, _) = listener.accept().map_err(failed("accepting"))?;
    for end in [&asks, &answers] {
        end.set_nodelay(true).map_err(failed("setting up its connection"))?;
    }
    let over = CancelToken::default();
    std::thread::scope(|scope| {
        scope.spawn(|| serve(source, answers));
        let handler = scope.spawn(|| {
            let (mut latency, stop) = (Latency::default(), Stop::on(&over));
            while let Ok(None) = stop.wait(missing.as_fd(), PollFlags::IN) {
                while let Some(fault) = missing.next().map_err(failed("reading a fault"))? {
                    let began = Instant::now();
                    let offset = ((fault.at.0 - here.region().address()) as u64) & !4095;
                    let mut page = [0; 4096];
                    asks.write_all(&offset.to_le_bytes()).map_err(failed("asking for a page"))?;
                    asks.read_exact(&mut page).map_err(failed("receiving a page"))?;
                    let span = here.region().span(offset, 4096).map_err(|_| out_of_memory())?;
                    let placed = missing.place(span, &page, PageSize::SIZE_4K);
                    placed.and_then(|_| missing.wake(span)).map_err(failed("placing a page"))?;
                    latency.record(began.elapsed());
                }
            }
            // The other end ends with the connection.
            drop(asks);
            Ok(latency.summary())
        });
        let touch = |thread| {
            let here = &here;
            move || touch(here, pages, threads, thread)
        };
        let touching: Vec<_> = (0..threads).map(|thread| scope.spawn(touch(thread))).collect();
        for thread in touching {
            let _ = thread.join();
        }
        over.cancel();
        handler.join().unwrap_or_else(|_| Err(out_of_memory()))
    })
}

/// Reads the first bytes of this thread's pages.
pub fn touch(memory: &Mapping, pages: u64, threads: usize, thread: usize) {
    for page in (0..).map_while(|step| page_at(pages, threads, thread, step)) {
        let mut bytes = [0; 8];
        if let Ok(span) = memory.region().span(page * 4096, 8) {
            span.copy_to(&mut bytes);
        }
    }
}

fn serve(source: &Mapping, mut answers: TcpStream) {
    let (mut offset, mut page) = ([0; 8], [0; 4096]);
    while answers.read_exact(&mut offset).is_ok() {
        let Ok(span) = source.region().span(u64::from_le_bytes(offset), 4096) else { return };
        span.copy_to(&mut page);
        if answers.write_all(&page).is_err() {
            return;
        }
    }
}

fn out_of_memory() -> BenchError {
    BenchError::Refused {
        who: "the bare handler".into(),
        what: "a page".into(),
        answer: "it is not in the memory".into(),
    }
}
