//! The client `qapi`, whose types are made from QEMU's schema: every answer and event has the type that the schema gives it.

use std::io::BufReader;
use std::os::unix::net::UnixStream;

use qapi::qmp::{self, MigrationStatus};
use qapi::{Qmp, Stream};

use super::Bed;
use super::common::{
    Deadline,
    qemu::{Version, peers_present},
};

#[test]
fn a_client_with_the_types_of_the_schema_understands_every_answer() {
    if !peers_present() {
        return;
    }
    let bed = Bed::new();
    let (_waiting, uri) = bed.waiting(Version::Qemu100, &[]);
    let (mut sender, _) = bed.send(&uri, &["--pause-before-switchover"]);
    let socket = UnixStream::connect(bed.socket()).unwrap();
    let mut client = Qmp::new(Stream::new(BufReader::new(socket.try_clone().unwrap()), socket));
    let greeting = client.handshake().unwrap();
    assert_eq!(greeting.version.qemu.major, 10);
    assert_eq!(client.execute(&qmp::query_version {}).unwrap().qemu.major, 10);
    let mut status = || client.execute(&qmp::query_migrate {}).unwrap();
    let held = Deadline::seconds(60).poll(
        "it is held",
        || sender.errors(),
        || {
            let now = status();
            (now.status == Some(MigrationStatus::pre_switchover)).then_some(now)
        },
    );
    let ram = held.ram.unwrap();
    assert!(ram.total > 0 && ram.transferred > 0, "{ram:?}");
    assert!(!client.execute(&qmp::query_status {}).unwrap().running);
    let commands = client.execute(&qmp::query_commands {}).unwrap();
    assert!(commands.iter().any(|command| command.name == "migrate-continue"), "{commands:?}");
    assert!(client.execute(&qmp::query_migrate_parameters {}).unwrap().downtime_limit.is_some());
    let capabilities = client.execute(&qmp::query_migrate_capabilities {}).unwrap();
    assert!(capabilities.iter().any(|capability| capability.state), "{capabilities:?}");
    assert!(!client.execute(&qmp::query_qmp_schema {}).unwrap().is_empty());
    client.execute(&qmp::migrate_continue { state: MigrationStatus::pre_switchover }).unwrap();
    let report = sender.finished(Deadline::seconds(60), 0);
    assert_eq!(report["status"], "completed", "{report}");
    // The monitor closes the connection behind its last event.
    assert!(client.read_response::<qmp::query_version>().is_err());
    let seen: Vec<_> = client
        .events()
        .filter_map(|event| match event {
            qmp::Event::MIGRATION { data, .. } => Some(data.status),
            _ => None,
        })
        .collect();
    assert_eq!(seen.last(), Some(&MigrationStatus::completed), "{seen:?}");
}
