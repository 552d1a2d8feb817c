//! The monitor of `serve`, where nothing is migrated.

use serde_json::json;

use super::common::{Deadline, ramwire::Ramwire, scratch};
use super::connect;

#[test]
fn a_server_of_memory_says_what_it_is_and_ends_at_quit() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (memory, socket) = (path("vm.mem"), path("monitor"));
    std::fs::write(&memory, vec![7; 1 << 20]).unwrap();
    let (listen, place) = (format!("unix:{}", path("pages").display()), format!("unix:{}", socket.display()));
    let arguments = ["serve", "--listen", &listen, "--qmp", &place, "--from"];
    let mut server = Ramwire::start(dir.path(), &arguments, &memory);
    let mut client = connect(&mut server, &socket);
    assert_eq!(client.execute("query-migrate", json!({})).unwrap(), json!({}));
    assert_eq!(client.execute("query-status", json!({})).unwrap()["status"], "paused");
    let commands = client.execute("query-commands", json!({})).unwrap();
    let has = |name: &str| commands.as_array().unwrap().iter().any(|command| command["name"] == name);
    assert!(has("quit") && has("query-version") && !has("migrate") && !has("migrate_cancel"), "{commands}");
    let refused = client.execute("migrate_cancel", json!({})).unwrap_err();
    assert!(format!("{refused:?}").contains("there is no command"), "{refused:?}");
    client.execute("quit", json!({})).unwrap();
    let (status, said) = server.ended(Deadline::seconds(60));
    assert_eq!(status, 0, "{said}");
    assert!(!socket.exists(), "the monitor's path stays");
}
