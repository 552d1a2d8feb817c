//! Both sides over sockets of this host.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::*;
use crate::stream::page_requests::{
    ANSWER_LEN, Answer, Asked, HELLO_LEN, REQUEST_LEN, Request, Welcome, encode_hello,
};
use crate::sys::{CancelToken, SpawnFn, spawn_thread};
use crate::transport::{Address, AllowList, Listener, StoredMemory, StreamOptions};
use crate::units::{PageIndex, PageSize};
use std::sync::Arc;

const PAGES: u64 = 900;

fn spawn() -> Arc<SpawnFn> {
    Arc::new(spawn_thread)
}

/// Every third page is a hole.
fn memory_file(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).unwrap();
    file.set_len(PAGES * 4096).unwrap();
    for page in (0..PAGES).filter(|page| page % 3 != 0) {
        file.write_all_at(&[page as u8 | 1; 4096], page * 4096).unwrap();
    }
    path
}

/// A server in threads of this process; dropping it breaks its connections.
struct Running {
    address: Address,
    cancel: CancelToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Running {
    fn at(address: &str, path: &Path) -> Self {
        let cancel = CancelToken::default();
        let stop = Stop::on(&cancel);
        let mut listener = Listener::bind(&address.parse().unwrap(), AllowList::default(), &stop).unwrap();
        let address = listener.address().clone();
        let server = PageServer::new(Arc::new(StoredMemory::plain(path).unwrap()));
        let thread = std::thread::spawn(move || {
            std::thread::scope(|scope| {
                while let Ok(channel) = listener.accept(&StreamOptions::default(), &stop) {
                    let (server, stop) = (server.clone(), stop.clone());
                    scope.spawn(move || server.serve(channel, &stop));
                }
            });
        });
        Self { address, cancel, thread: Some(thread) }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.cancel.cancel();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

#[test]
fn memory_on_another_host_is_read_by_many_threads_of_many_clients() {
    let dir = folder();
    let path = memory_file(dir.path(), "memory");
    let contents = std::fs::read(&path).unwrap();
    let own = StoredMemory::plain(&path).unwrap();
    let socket = format!("unix:{}", dir.path().join("socket").display());
    for address in ["tcp:127.0.0.1:0", &socket] {
        let server = Running::at(address, &path);
        std::thread::scope(|scope| {
            for client in 0..3u64 {
                let (server, contents, own) = (&server, &contents, &own);
                scope.spawn(move || {
                    let remote = RemoteMemory::connect(&server.address, spawn()).unwrap();
                    let remote = StoredMemory::remote(remote);
                    assert_eq!((remote.len(), remote.identity()), (own.len(), own.identity()));
                    let map =
                        |memory: &StoredMemory| memory.present(4096, (PAGES - 1) * 4096, PageSize::SIZE_4K);
                    assert!(map(&remote).words() == map(own).words());
                    assert!(map(&remote).get(PageIndex(0)) && !map(&remote).get(PageIndex(2)));
                    std::thread::scope(|scope| {
                        for thread in 0..4u64 {
                            let remote = &remote;
                            scope.spawn(move || {
                                for step in 0..40u64 {
                                    let at = ((step * 7919 + thread * 104_729 + client * 31) * 613
                                        % contents.len() as u64)
                                        as usize;
                                    let len = (1 + step as usize * 40_000).min(contents.len() - at);
                                    let mut into = vec![9; len];
                                    remote.read_at(at as u64, &mut into).unwrap();
                                    assert!(into == contents[at..at + len], "{at} {len}");
                                }
                            });
                        }
                    });
                });
            }
        });
    }
}

#[test]
fn a_connection_that_is_lost_is_made_anew_and_another_memory_is_refused() {
    let dir = folder();
    let (path, other) = (memory_file(dir.path(), "memory"), memory_file(dir.path(), "other"));
    let server = Running::at("tcp:127.0.0.1:0", &path);
    let address = server.address.to_string();
    let remote = StoredMemory::remote(RemoteMemory::connect(&server.address, spawn()).unwrap());
    let read = || {
        let mut page = [0; 4096];
        remote.read_at(4096, &mut page).map(|()| page[0])
    };
    assert_eq!(read().unwrap(), 1);
    drop(server);
    assert!(read().is_err());
    // What can't be asked may hold something.
    assert_eq!(remote.present(0, 8 * 4096, PageSize::SIZE_4K).count(), 8);
    let until = |is_so: &dyn Fn() -> bool| {
        let began = std::time::Instant::now();
        while !is_so() {
            assert!(began.elapsed().as_secs() < 60);
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    };
    let server = Running::at(&address, &other);
    until(&|| read().is_err_and(|error| error.to_string().contains("serves other memory")));
    drop(server);
    let _server = Running::at(&address, &path);
    until(&|| read().is_ok_and(|byte| byte == 1));
    let cut = File::options().write(true).open(&path).unwrap();
    cut.set_len(4096).unwrap();
    assert!(read().unwrap_err().to_string().contains("fill"), "why is told: {}", read().unwrap_err());
    cut.set_len(PAGES * 4096).unwrap();
    assert_eq!(read().unwrap(), 0, "it may be asked again");
}

#[test]
fn a_client_that_asks_for_nonsense_is_hung_up_on_and_others_are_served() {
    let dir = folder();
    let server = Running::at("tcp:127.0.0.1:0", &memory_file(dir.path(), "memory"));
    let (host, port) = ("127.0.0.1", server.address.host_and_port().unwrap().1);
    let good = StoredMemory::remote(RemoteMemory::connect(&server.address, spawn()).unwrap());
    let mut hello = Vec::new();
    encode_hello(&mut hello);
    let request = |offset, len| {
        let mut out = hello.clone();
        Request { number: 1, asked: Asked::Read, offset, len }.encode(&mut out);
        out
    };
    let mut kind = request(0, 1);
    kind[HELLO_LEN + 7] = 9;
    for said in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        request(PAGES * 4096, 1),
        request(0, u64::MAX),
        request(u64::MAX, 2),
        kind,
    ] {
        let mut client = TcpStream::connect((host, port)).unwrap();
        client.write_all(&said).unwrap();
        // At most the welcome.
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        assert!(answer.len() <= 36, "{answer:?}");
    }
    let mut byte = [0];
    good.read_at(5000, &mut byte).unwrap();
    assert_eq!(byte, [1]);
}

#[test]
fn a_server_that_answers_nonsense_is_left_and_nobody_waits() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: Address =
        format!("tcp:127.0.0.1:{}", listener.local_addr().unwrap().port()).parse().unwrap();
    let mut welcome = Vec::new();
    Welcome { id: [1; 16], len: 1 << 20 }.encode(&mut welcome);
    let answer = |number, is_done, len| {
        let mut out = Vec::new();
        Answer { number, is_done, len }.encode(&mut out);
        assert_eq!(out.len(), ANSWER_LEN);
        out
    };
    let mut status = answer(1, true, 4096);
    status[7] = 7;
    for said in [
        answer(1, true, 4097),
        answer(1, true, u64::MAX),
        answer(2, true, 4096),
        answer(1, false, 1 << 40),
        status,
        vec![0; 5],
    ] {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut client, _) = listener.accept().unwrap();
                client.read_exact(&mut [0; HELLO_LEN]).unwrap();
                client.write_all(&welcome).unwrap();
                client.read_exact(&mut [0; REQUEST_LEN]).unwrap();
                client.write_all(&said).unwrap();
            });
            let remote = StoredMemory::remote(RemoteMemory::connect(&address, spawn()).unwrap());
            assert!(remote.read_at(0, &mut [0; 4096]).is_err(), "{said:?}");
        });
    }
    std::thread::scope(|scope| {
        scope.spawn(|| listener.accept().unwrap().0.write_all(&[b'x'; 36]).unwrap());
        let error = RemoteMemory::connect(&address, spawn()).unwrap_err();
        let error = crate::error::Chain(&error).to_string();
        assert!(error.contains("no page server's connection"), "{error}");
    });
}
