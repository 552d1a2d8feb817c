//! The process of a VMM that does its side of the hand-over, and the test's handle for it.

use super::*;

/// How the stand-in receives its task.
pub(super) const STAND_IN: &str = "RAMWIRE_PAGER_STAND_IN";

/// Pages of the stored memory.
pub(super) const PAGES: u64 = 3000;

/// The first bytes of a page hold its number; every fifth page is zero, and in the middle there is a hole.
pub(super) fn expected(page: u64) -> u64 {
    if page.is_multiple_of(5) || (1000..1200).contains(&page) { 0 } else { page }
}

pub(super) fn write_page(file: &File, page: u64) {
    let mut bytes = [page as u8 | 1; 4096];
    bytes[..8].copy_from_slice(&page.to_le_bytes());
    file.write_all_at(&bytes, page * 4096).unwrap();
}

pub(super) fn memory_file(folder: &Path, pages: u64) -> PathBuf {
    let path = folder.join("memory");
    let file = File::create(&path).unwrap();
    file.set_len(pages * 4096).unwrap();
    (0..pages).filter(|page| expected(*page) != 0).for_each(|page| write_page(&file, page));
    path
}

pub(super) fn number(region: &HostRegion, page: u64) -> u64 {
    let mut bytes = [1; 8];
    region.span(page * 4096, 8).unwrap().copy_to(&mut bytes);
    u64::from_le_bytes(bytes)
}

// The VMM's side.

pub(super) fn uffd(regions: &[&HostRegion]) -> Uffd {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(true);
    let uffd = builder.require_features(FeatureFlags::EVENT_REMOVE).create().unwrap();
    for region in regions {
        uffd.register(region.address() as *mut _, region.len() as usize).unwrap();
    }
    uffd
}

pub(super) fn hand_over(socket: &UnixStream, message: &str, descriptors: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    let sent = sendmsg(socket, &[IoSlice::new(message.as_bytes())], &mut ancillary, SendFlags::empty());
    assert_eq!(sent.unwrap(), message.len());
}

pub(super) fn element(region: &HostRegion, offset: u64, page: u64) -> Value {
    json!({
        "base_host_virt_addr": region.address(), "size": region.len(), "offset": offset,
        "page_size": page, "page_size_kib": page,
    })
}

/// Waits for a line from the test.
pub(super) fn told() {
    std::io::stdin().lock().read_line(&mut String::new()).unwrap();
}

pub(super) fn say(line: &str) {
    println!("stand-in: {line}");
    std::io::stdout().flush().unwrap();
}

#[test]
#[ignore = "the process of a VMM, started by the other tests"]
fn stand_in() {
    let Ok(orders) = std::env::var(STAND_IN) else { return };
    let orders: Value = serde_json::from_str(&orders).unwrap();
    let does = orders["does"].as_str().unwrap();
    let connect = || UnixStream::connect(orders["socket"].as_str().unwrap()).unwrap();
    if does == "connect" {
        let socket = connect();
        say("connected");
        // It is hung up on.
        assert_eq!(std::io::Read::read(&mut &socket, &mut [0]).unwrap_or(0), 0);
        return;
    }
    let page = if orders["huge"] == true { PageSize::SIZE_2M } else { PageSize::SIZE_4K };
    let pages = orders["pages"].as_u64().unwrap();
    // Two regions, the second half of the memory at the lower offset of the message.
    let half = pages / 2 * 4096;
    let map = || match page {
        PageSize::SIZE_2M => Mapping::anonymous_huge(half, page).unwrap(),
        _ => Mapping::anonymous(half).unwrap(),
    };
    let (low, high) = (map(), map());
    let (low, high) = (low.region(), high.region());
    let uffd = uffd(&[low, high]);
    let socket = connect();
    let regions = json!([element(high, half, page.bytes()), element(low, 0, page.bytes())]);
    hand_over(&socket, &regions.to_string(), &[uffd.as_fd()]);
    say("handed over");
    let at = |page: u64| if page * 4096 < half { (low, page) } else { (high, page - half / 4096) };
    let read = |page: u64| {
        let (region, page) = at(page);
        number(region, page)
    };
    if does == "last" {
        assert_eq!(read(pages - 1), expected(pages - 1));
        return say("read");
    }
    let first = if does == "half" { pages / 2 } else { pages };
    // The balloon is every seventh host page: one thread frees them, the others read and write the rest.
    let unit = page.bytes() / 4096;
    let is_balloon = |page: u64| (page / unit).is_multiple_of(7);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                for step in 0..first {
                    // Each thread touches all of them, in a different order.
                    let page = (step * [7, 11, 13, 17][thread as usize] + thread * 131) % first;
                    if is_balloon(page) {
                        continue;
                    }
                    let found = read(page);
                    let written = expected(page) | 1 << 40;
                    assert!(found == expected(page) || found == written, "page {page} is {found:#x}");
                    if page % 4 == thread {
                        let (region, page) = at(page);
                        region.span(page * 4096, 8).unwrap().copy_from(&written.to_le_bytes());
                    }
                }
            });
        }
        scope.spawn(|| {
            for unit_at in (0..first / unit).map(|at| at * unit).filter(|page| is_balloon(*page)) {
                // Some before they were ever touched, some after, some again.
                if (unit_at / unit).is_multiple_of(2) {
                    assert_eq!(read(unit_at), expected(unit_at));
                }
                for _ in 0..1 + unit_at / unit % 3 {
                    let (region, page_in) = at(unit_at);
                    discard(region.span(page_in * 4096, page.bytes()).unwrap(), page).unwrap();
                    assert_eq!(read(unit_at), 0, "page {unit_at} was given back");
                }
            }
        });
    });
    say("touched");
    if does == "half" {
        told();
    }
    // Written pages keep their content, freed pages stay zero.
    for page in 0..first {
        let want = match is_balloon(page) {
            true => 0,
            false => expected(page) | 1 << 40,
        };
        assert_eq!(read(page), want, "page {page}");
    }
    say("whole");
}

// The test's side.

/// A running stand-in; dropping it kills it.
pub(super) struct StandIn {
    pub(super) child: Child,
    pub(super) lines: std::sync::mpsc::Receiver<String>,
    input: ChildStdin,
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl StandIn {
    pub(super) fn start(orders: &Value, user: Option<u32>) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["stand_in::stand_in", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
        command.env(STAND_IN, orders.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        if let Some(user) = user {
            command.uid(user);
        }
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output: ChildStdout = child.stdout.take().unwrap();
        let (tell, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some((_, line)) = line.split_once("stand-in: ") {
                    let _ = tell.send(line.to_owned());
                }
            }
        });
        Self { child, lines, input }
    }

    /// What the server calls it.
    pub(super) fn name(&self) -> String {
        format!("process {} of user {}", self.child.id(), rustix::process::geteuid().as_raw())
    }

    /// Waits for a line.
    pub(super) fn says(&self, line: &str) {
        let said = self.lines.recv_timeout(std::time::Duration::from_secs(120));
        assert_eq!(said.as_deref(), Ok(line));
    }

    pub(super) fn tell(&mut self) {
        self.input.write_all(b"go on\n").unwrap();
    }

    pub(super) fn ends_well(mut self) {
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
}
