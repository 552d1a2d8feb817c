//! A QEMU as source or destination: its memory is a file, its monitor a socket, and it always ends with the test.

use std::{
    env,
    ffi::OsString,
    fmt,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::OnceLock,
};

use serde_json::{Value, json};

use super::{
    Deadline,
    qmp::{Qmp, QmpError},
};

/// Which QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    Qemu72,
    Qemu100,
    /// The newest that Debian had when `ci/setup` fetched it; 11.1 or later.
    Newest,
}

impl Version {
    pub(crate) const ALL: [Self; 3] = [Self::Qemu72, Self::Qemu100, Self::Newest];

    /// All pairs of versions, in both directions. All of them have machine type [`Machine::PcI440fx72`].
    pub(crate) fn pairs() -> impl Iterator<Item = (Self, Self)> {
        let all = |from| Self::ALL.into_iter().map(move |to| (from, to));
        Self::ALL.into_iter().flat_map(all).filter(|(from, to)| from != to)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Qemu72 => "7.2",
            Self::Qemu100 => "10.0",
            Self::Newest => "newest",
        }
    }

    /// Its name for ramwire's `--peer`.
    pub(crate) fn peer(self) -> &'static str {
        match self {
            Self::Qemu72 => "qemu-7.2",
            Self::Qemu100 | Self::Newest => "qemu-10.0",
        }
    }

    /// The program, as given by the environment or built by `ci/setup`.
    pub(crate) fn program(self) -> Option<PathBuf> {
        let variable = match self {
            Self::Qemu72 => "RAMWIRE_QEMU72",
            Self::Qemu100 => "RAMWIRE_QEMU100",
            Self::Newest => "RAMWIRE_QEMU_NEWEST",
        };
        let made = || super::project_root().join("target/peers").join(format!("qemu-{}", self.name()));
        let path = env::var_os(variable).map_or_else(made, PathBuf::from);
        path.exists().then_some(path)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Newest => write!(f, "QEMU {}", newest_version()),
            known => write!(f, "QEMU {}", known.name()),
        }
    }
}

/// The version that the newest QEMU reports.
fn newest_version() -> &'static str {
    static TOLD: OnceLock<String> = OnceLock::new();
    TOLD.get_or_init(|| {
        let told = Version::Newest
            .program()
            .and_then(|program| Command::new(program).arg("--version").output().ok());
        let text =
            told.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
        text.split_whitespace().nth(3).unwrap_or("newest").to_owned()
    })
}

/// True if all QEMUs are present; otherwise reports that the calling test is skipped, or fails it if `CI=true`.
pub(crate) fn peers_present() -> bool {
    let missing: Vec<String> =
        Version::ALL.iter().filter(|version| version.program().is_none()).map(ToString::to_string).collect();
    if !missing.is_empty() {
        super::skip(&format!("there is no {}; run ci/setup", missing.join(" and no ")));
    }
    missing.is_empty()
}

/// True if QEMUs can run their guests by KVM; otherwise reports that the calling test is skipped, or fails it if `CI=true`.
pub(crate) fn kvm_present() -> bool {
    let opened = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        super::skip(&format!("/dev/kvm can't be opened: {error}"));
    }
    opened.is_ok()
}

/// Machine type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Machine {
    Pc,
    Q35,
    Microvm,
    /// The newest type that all versions support, and so the one that can be migrated between them.
    PcI440fx72,
    /// Old enough to write neither configuration section nor footers; QEMU 10.0 no longer has it.
    PcI440fx23,
}

impl Machine {
    pub(crate) const ALL: [Self; 4] = [Self::Pc, Self::Q35, Self::Microvm, Self::PcI440fx72];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pc => "pc",
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
            Self::PcI440fx72 => "pc-i440fx-7.2",
            Self::PcI440fx23 => "pc-i440fx-2.3",
        }
    }
}

/// How to start a QEMU. By default it has no devices, is paused, and expects no migration.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) version: Version,
    pub(crate) machine: Machine,
    /// File of `ram_kib` KiB; it is the guest's RAM block `m0`, shared, so the test can read it at any time.
    pub(crate) ram: PathBuf,
    pub(crate) ram_kib: usize,
    pub(crate) running: bool,
    pub(crate) incoming: bool,
    /// By KVM and not by the emulator.
    pub(crate) on_kvm: bool,
    pub(crate) extra: Vec<OsString>,
}

impl Guest {
    pub(crate) fn new(version: Version, machine: Machine, ram: impl Into<PathBuf>, ram_mib: usize) -> Self {
        let ram = ram.into();
        let (running, incoming, on_kvm) = (false, false, false);
        Self { version, machine, ram, ram_kib: ram_mib << 10, running, incoming, on_kvm, extra: vec![] }
    }

    /// Starts a guest that waits for [`Qemu::listen`].
    pub(crate) fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    pub(crate) fn running(mut self) -> Self {
        self.running = true;
        self
    }

    /// For what does not work under the emulator; ask [`kvm_present`] first.
    pub(crate) fn on_kvm(mut self) -> Self {
        self.on_kvm = true;
        self
    }

    pub(crate) fn with<S: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.extra.extend(arguments.into_iter().map(Into::into));
        self
    }

    fn arguments(&self, monitor: &Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(OsString::from));
        let size = format!("{}K", self.ram_kib);
        let accel = if self.on_kvm { "kvm" } else { "tcg" };
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-accel", accel, "-m", &size]);
        add(&["-machine", &format!("{},memory-backend=m0", self.machine.name())]);
        let backend =
            format!("memory-backend-file,id=m0,size={size},mem-path={},share=on", self.ram.display());
        add(&["-object", &backend, "-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        if !self.running {
            add(&["-S"]);
        }
        if self.incoming {
            add(&["-incoming", "defer"]);
        }
        arguments.extend(self.extra.iter().cloned());
        arguments
    }

    /// Starts it and connects to its monitor. `name` distinguishes it from others in `dir` and in messages.
    ///
    /// The kernel ends the QEMU together with the calling thread, so that a killed test leaves no process running.
    ///
    /// # Panics
    ///
    /// If it does not start within 20 s, with its stderr.
    pub(crate) fn start(&self, dir: &Path, name: &str) -> Qemu {
        let program = self.version.program().expect("ask peers_present() first");
        let monitor = dir.join(format!("{name}.qmp"));
        let errors = dir.join(format!("{name}.stderr"));
        let _ = fs::remove_file(&monitor);
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(self.arguments(&monitor))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors).expect("cannot create a file for stderr"))
            .spawn()
            .expect("cannot start setpriv (util-linux)");
        let label = format!("{name} ({}, {})", self.version, self.machine.name());
        let mut starting = Starting { child: Some(child) };
        let state = || fs::read_to_string(&errors).unwrap_or_default();
        let qmp = Deadline::seconds(20).poll(&format!("{label}: monitor"), state, || {
            if let Ok(Some(status)) = starting.child.as_mut().expect("not taken yet").try_wait() {
                panic!("{label}: ended at start with {status}\n{}", state());
            }
            Qmp::connect(&monitor).ok()
        });
        let child = starting.child.take().expect("not taken yet");
        Qemu { child, qmp, label, errors, dir: dir.to_owned(), ram: self.ram.clone() }
    }
}

/// Ends a QEMU whose monitor did not appear.
struct Starting {
    child: Option<Child>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A running QEMU; dropping it kills it.
pub(crate) struct Qemu {
    child: Child,
    qmp: Qmp,
    label: String,
    errors: PathBuf,
    dir: PathBuf,
    pub(crate) ram: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Qemu {
    /// Its output on stderr, with its name: for failure messages.
    pub(crate) fn stderr(&self) -> String {
        format!("stderr of {}:\n{}", self.label, fs::read_to_string(&self.errors).unwrap_or_default())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a monitor command that may be refused.
    pub(crate) fn try_execute(&mut self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.qmp.execute(command, arguments)
    }

    /// Runs a monitor command.
    ///
    /// # Panics
    ///
    /// If it is refused or QEMU is gone.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        match self.qmp.execute(command, arguments) {
            Ok(answer) => answer,
            Err(error) => panic!("{}: {error:?}\n{}", self.label, self.stderr()),
        }
    }

    /// Events received so far, oldest first.
    pub(crate) fn events(&self) -> &[Value] {
        &self.qmp.events
    }

    pub(crate) fn set_capabilities(&mut self, on: &[&str]) {
        let list: Vec<Value> = on.iter().map(|name| json!({"capability": name, "state": true})).collect();
        self.execute("migrate-set-capabilities", json!({ "capabilities": list }));
    }

    pub(crate) fn set_capability(&mut self, name: &str, on: bool) {
        let list = json!([{"capability": name, "state": on}]);
        self.execute("migrate-set-capabilities", json!({ "capabilities": list }));
    }

    /// For example `json!({"max-bandwidth": 0, "downtime-limit": 300})`.
    pub(crate) fn set_parameters(&mut self, parameters: Value) {
        self.execute("migrate-set-parameters", parameters);
    }

    /// Lets a guest started with [`Guest::incoming`] listen on a free TCP port of this machine.
    ///
    /// Returns the URI to migrate to.
    pub(crate) fn listen_tcp(&mut self) -> String {
        self.listen("tcp:127.0.0.1:0");
        let port = self.execute("query-migrate", json!({}))["socket-address"][0]["port"].clone();
        format!("tcp:127.0.0.1:{}", port.as_str().expect("QEMU tells its port"))
    }

    /// Makes it listen on a unix socket in its folder; returns the URI to migrate to.
    pub(crate) fn listen_unix(&mut self) -> String {
        let name = self.label.split(' ').next().unwrap_or("guest");
        let uri = format!("unix:{}", self.dir.join(format!("{name}.migration")).display());
        self.listen(&uri);
        uri
    }

    /// Lets a guest started with [`Guest::incoming`] listen on `uri`, as written.
    pub(crate) fn listen(&mut self, uri: &str) {
        self.execute("migrate-incoming", json!({ "uri": uri }));
    }

    /// Begins a migration to `uri`; QEMU's own bandwidth limit of 128 MiB/s applies unless a parameter changes it.
    pub(crate) fn migrate(&mut self, uri: &str) {
        self.execute("migrate", json!({ "uri": uri }));
    }

    /// `query-migrate`, whole.
    pub(crate) fn query_migrate(&mut self) -> Value {
        self.execute("query-migrate", json!({}))
    }

    /// Waits until the migration has ended in any way; returns the last `query-migrate`.
    pub(crate) fn wait_migration(&mut self, deadline: Deadline) -> Value {
        loop {
            let info = self.query_migrate();
            if matches!(info["status"].as_str(), Some("completed" | "failed" | "cancelled")) {
                return info;
            }
            assert!(!deadline.is_over(), "{}: still migrating: {info}\n{}", self.label, self.stderr());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Waits until the migration has completed; returns the last `query-migrate`.
    ///
    /// # Panics
    ///
    /// If it failed, was cancelled, or is not over at the deadline.
    pub(crate) fn wait_completed(&mut self, deadline: Deadline) -> Value {
        let info = self.wait_migration(deadline);
        assert_eq!(info["status"], "completed", "{}: {info}\n{}", self.label, self.stderr());
        info
    }

    /// As [`wait_completed`](Self::wait_completed), for a guest that writes: see
    /// [`wait_migration_within`](Self::wait_migration_within).
    pub(crate) fn wait_completed_within(&mut self, passes: u64, deadline: Deadline) -> Value {
        let info = self.wait_migration_within(passes, deadline);
        assert_eq!(info["status"], "completed", "{}: {info}\n{}", self.label, self.stderr());
        info
    }

    /// As [`wait_migration`](Self::wait_migration), for a guest that writes: after `passes` passes over its memory any
    /// downtime is accepted. So the migration also ends on a machine that sends less than the guest writes.
    pub(crate) fn wait_migration_within(&mut self, passes: u64, deadline: Deadline) -> Value {
        loop {
            let info = self.query_migrate();
            if info["status"] != "setup" && info["status"] != "active" {
                return self.wait_migration(deadline);
            }
            if info["ram"]["dirty-sync-count"].as_u64() > Some(passes) {
                self.set_parameters(json!({"downtime-limit": 600_000}));
                return self.wait_migration(deadline);
            }
            assert!(!deadline.is_over(), "{}: still migrating: {info}\n{}", self.label, self.stderr());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Run state, such as `running`, `paused`, `inmigrate`, `postmigrate`.
    pub(crate) fn status(&mut self) -> String {
        self.execute("query-status", json!({}))["status"].as_str().unwrap_or("none").to_owned()
    }

    /// Waits for a run state.
    pub(crate) fn wait_status(&mut self, wanted: &str, deadline: Deadline) {
        loop {
            let status = self.status();
            if status == wanted {
                return;
            }
            assert!(!deadline.is_over(), "{}: {status}, not {wanted}\n{}", self.label, self.stderr());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Kills it like a crash would (SIGKILL).
    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait_exit(&mut self, deadline: Deadline) -> ExitStatus {
        loop {
            if let Some(status) = self.child.try_wait().expect("cannot wait for QEMU") {
                return status;
            }
            assert!(!deadline.is_over(), "{}: has not ended\n{}", self.label, self.stderr());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}
