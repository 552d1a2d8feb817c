//! A conversation with a migration that runs nowhere.
#![allow(clippy::unwrap_used)]

use ramwire::observe::{SharedStatistics, Status};
use ramwire::session::CancelReply;
use serde_json::{Value, json};

use super::conversation::Conversation;
use super::{Order, Plan, Role, Subject};

fn subject() -> Subject {
    let plan = Plan::default().having("multifd", true).with("multifd-channels", 4);
    Subject::new(Role::Source, SharedStatistics::default(), plan, || CancelReply::Accepted)
}

fn say(conversation: &mut Conversation, subject: &Subject, text: &str) -> Vec<Value> {
    let mut input = text.as_bytes();
    let lines = std::iter::from_fn(|| conversation.next(&mut input, subject));
    lines.map(|line| serde_json::from_str(line.strip_suffix("\r\n").unwrap()).unwrap()).collect()
}

/// The answers to each command after the negotiation.
fn answers(subject: &Subject, text: &str) -> Vec<Value> {
    let mut conversation = Conversation::default();
    let first =
        say(&mut conversation, subject, r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#);
    assert_eq!(first, [json!({"return": {}})]);
    say(&mut conversation, subject, text)
}

fn answer(subject: &Subject, command: Value) -> Value {
    let mut all = answers(subject, &command.to_string());
    assert_eq!(all.len(), 1);
    all.remove(0)
}

fn class(answer: &Value) -> &str {
    assert!(answer["error"]["desc"].as_str().is_some_and(|text| !text.is_empty()), "{answer}");
    answer["error"]["class"].as_str().unwrap()
}

#[test]
fn nothing_is_done_before_the_negotiation_which_comes_once() {
    let (subject, mut client) = (subject(), Conversation::default());
    let greeting: Value = serde_json::from_str(&Conversation::greeting()).unwrap();
    assert_eq!(greeting["QMP"]["capabilities"], json!(["oob"]));
    assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 10);
    let early = say(&mut client, &subject, r#"{"execute":"query-status"}{"execute":"nonsense","id":1}"#);
    assert_eq!(early.iter().map(class).collect::<Vec<_>>(), ["CommandNotFound"; 2]);
    assert!(!client.takes_events());
    let wrong = r#"{"execute":"qmp_capabilities","arguments":{"enable":["more"]}}"#;
    assert_eq!(class(&say(&mut client, &subject, wrong)[0]), "GenericError");
    let both = r#"{"execute":"qmp_capabilities"}{"execute":"qmp_capabilities","id":"again"}"#;
    let said = say(&mut client, &subject, both);
    assert_eq!(said[0], json!({"return": {}}));
    assert_eq!((class(&said[1]), &said[1]["id"]), ("CommandNotFound", &json!("again")));
    assert!(client.takes_events());
    let urgent = say(&mut client, &subject, r#"{"exec-oob":"migrate-pause"}"#);
    assert!(urgent[0]["error"]["desc"].as_str().unwrap().contains("qmp_capabilities"), "not asked for");
}

/// A web page may have a browser post commands to a port of this host.
#[test]
fn who_begins_with_other_words_than_json_is_not_obeyed() {
    let (subject, mut client) = (subject(), Conversation::default());
    let posted = "POST / HTTP/1.1\r\nHost: 127.0.0.1:4444\r\n\r\n{\"execute\": \"qmp_capabilities\"}{\"execute\": \"quit\"}";
    let said = say(&mut client, &subject, posted);
    assert_eq!(said.iter().map(class).collect::<Vec<_>>(), ["GenericError"], "told once");
    assert!(client.is_not_qmp() && !client.takes_events());
    assert!(say(&mut client, &subject, r#"{"execute":"qmp_capabilities"}"#).is_empty());
    // A byte to begin anew is no such input, nor is any input after the negotiation.
    let mut client = Conversation::default();
    let said = say(
        &mut client,
        &subject,
        "\u{1}{\"execute\": \"qmp_capabilities\"} what {\"execute\": \"query-status\"}",
    );
    let kinds: Vec<_> = said.iter().map(|answer| answer.get("return").is_some()).collect();
    assert_eq!(kinds, [false, true, false, true], "{said:?}");
}

#[test]
fn every_command_gets_one_answer_with_its_id() {
    let subject = subject();
    let status = json!({"status": "paused", "running": false});
    let text = r#"{"execute":"query-status","id":{"a":[1]}}  {"id":null,"execute":"query-status"}"#;
    let told = answers(&subject, text);
    assert_eq!(told, [json!({"return": status, "id": {"a": [1]}}), json!({"return": status, "id": null})]);
    #[rustfmt::skip]
    let cases = [
        ("no object",               r#"[{"execute":"query-status"}]"#,                        "GenericError"),
        ("no command",              r#"{"arguments":{}}"#,                                    "GenericError"),
        ("a number as command",     r#"{"execute":5}"#,                                       "GenericError"),
        ("both kinds",              r#"{"execute":"query-status","exec-oob":"query-status"}"#, "GenericError"),
        ("a member too many",       r#"{"execute":"query-status","more":1}"#,                 "GenericError"),
        ("arguments of no object",  r#"{"execute":"query-status","arguments":[]}"#,           "GenericError"),
        ("an argument too many",    r#"{"execute":"query-status","arguments":{"x":1}}"#,      "GenericError"),
        ("an argument too few",     r#"{"execute":"migrate-continue"}"#,                      "GenericError"),
        ("an argument of no state", r#"{"execute":"migrate-continue","arguments":{"state":"x"}}"#, "GenericError"),
        ("an unknown command",      r#"{"execute":"device_add"}"#,                            "CommandNotFound"),
        ("one that is not urgent",  r#"{"exec-oob":"query-status"}"#,                         "GenericError"),
        ("an unknown urgent one",   r#"{"exec-oob":"device_add"}"#,                           "CommandNotFound"),
        ("no JSON",                 "{'execute':'query-status'}",                             "GenericError"),
    ];
    for (what, text, wanted) in cases {
        let told = answers(&subject, text);
        assert_eq!(told.iter().map(class).collect::<Vec<_>>(), [wanted], "{what}");
    }
}

#[test]
fn parameters_have_bounds_and_change_all_or_none() {
    let subject = subject();
    let set =
        |changes: Value| answer(&subject, json!({"execute": "migrate-set-parameters", "arguments": changes}));
    let get =
        |name: &str| answer(&subject, json!({"execute": "query-migrate-parameters"}))["return"][name].clone();
    assert_eq!(set(json!({"max-bandwidth": 5_000_000, "downtime-limit": 20})), json!({"return": {}}));
    assert_eq!((get("max-bandwidth"), get("downtime-limit")), (json!(5_000_000), json!(20)));
    for wrong in [
        json!({"downtime-limit": 2_000_001}),
        json!({"downtime-limit": -1}),
        json!({"max-bandwidth": "5M"}),
        json!({"max-bandwidth": 1.5}),
        json!({"max-bandwidth": 1, "cpu-throttle-initial": 20}),
        json!({"max-bandwidth": 1, "multifd-channels": 8}),
        json!({"multifd-compression": "lz4"}),
    ] {
        assert_eq!(class(&set(wrong.clone())), "GenericError", "{wrong}");
        assert_eq!(get("max-bandwidth"), json!(5_000_000), "{wrong}");
    }
    // A value that is set already may be set again.
    assert_eq!(set(json!({"multifd-channels": 4})), json!({"return": {}}));
}

#[test]
fn a_migration_that_runs_has_the_capabilities_that_it_began_with() {
    let subject = subject();
    let told = answer(&subject, json!({"execute": "query-migrate-capabilities"}));
    let list = told["return"].as_array().unwrap();
    let on: Vec<_> = list.iter().filter(|row| row["state"] == true).map(|row| &row["capability"]).collect();
    assert_eq!(on, ["events", "return-path", "multifd"]);
    let set = |name: &str, state: bool| {
        let change = json!({"capabilities": [{"capability": name, "state": state}]});
        answer(&subject, json!({"execute": "migrate-set-capabilities", "arguments": change}))
    };
    for (name, state) in
        [("multifd", false), ("xbzrle", true), ("events", false), ("x-colo", true), ("no", false)]
    {
        assert_eq!(class(&set(name, state)), "GenericError", "{name}");
    }
    // A state that is set already may be set again, and an absent capability may be set to off.
    for (name, state) in [("multifd", true), ("events", true), ("x-colo", false)] {
        assert_eq!(set(name, state), json!({"return": {}}), "{name}");
    }
}

#[test]
fn what_only_a_running_migration_can_do_is_refused_else() {
    let subject = subject();
    for command in ["migrate-pause", "migrate-start-postcopy"] {
        assert_eq!(class(&answer(&subject, json!({"execute": command}))), "GenericError", "{command}");
    }
    let go_on = json!({"execute": "migrate-continue", "arguments": {"state": "pre-switchover"}});
    assert_eq!(class(&answer(&subject, go_on)), "GenericError");
    let migrate = json!({"execute": "migrate", "arguments": {"uri": "tcp:host:1"}});
    assert_eq!(class(&answer(&subject, migrate)), "GenericError", "it has begun");
}

#[test]
fn a_relay_says_why_a_limit_can_not_change() {
    let set = json!({"execute": "migrate-set-parameters", "arguments": {"downtime-limit": 100}});
    let idle =
        Subject::new(Role::Relay, SharedStatistics::default(), Plan::default(), || CancelReply::Accepted);
    let words = answer(&idle, set)["error"]["desc"].to_string();
    assert!(words.contains("at a relay") && !words.contains("has begun"), "{words}");
}

#[test]
fn a_cancel_is_told_until_the_end() {
    let subject = subject();
    let status = || answer(&subject, json!({"execute": "query-migrate"}))["return"]["status"].clone();
    assert_eq!(status(), Value::Null, "not begun");
    subject.statistics().update(|now| now.status = Status::Active);
    assert_eq!(status(), "active");
    assert_eq!(answer(&subject, json!({"execute": "migrate_cancel"})), json!({"return": {}}));
    assert_eq!(status(), "cancelling");
    subject.statistics().update(|now| (now.status, now.ended) = (Status::Cancelled, true));
    assert_eq!(status(), "cancelled");
    let late =
        Subject::new(Role::Source, SharedStatistics::default(), Plan::default(), || CancelReply::TooLate);
    for command in ["migrate_cancel", "quit"] {
        assert_eq!(class(&answer(&late, json!({"execute": command}))), "GenericError", "{command}");
    }
}

#[test]
fn a_migration_that_waits_is_planned_and_begins_once() {
    let (give, orders) = crossbeam::channel::unbounded();
    let subject =
        Subject::new(Role::Source, SharedStatistics::default(), Plan::default(), || CancelReply::Accepted)
            .admitting(|uri| uri.parse().map_err(|_| format!("{uri} is no address")))
            .waiting(give);
    let migrate = |uri: &str| {
        let arguments = json!({"uri": uri, "detach": true, "resume": false});
        answer(&subject, json!({"execute": "migrate", "arguments": arguments}))
    };
    let switch = |names: &[&str]| {
        let list: Vec<_> = names.iter().map(|name| json!({"capability": name, "state": true})).collect();
        answer(&subject, json!({"execute": "migrate-set-capabilities", "arguments": {"capabilities": list}}))
    };
    let done = json!({"return": {}});
    assert_eq!(class(&migrate("nowhere")), "GenericError");
    assert_eq!(switch(&["zero-copy-send"]), done);
    assert_eq!(class(&migrate("tcp:host:1")), "GenericError", "what it needs is off");
    assert_eq!(class(&switch(&["auto-converge"])), "GenericError");
    assert_eq!(switch(&["multifd", "postcopy-ram"]), done);
    let set = json!({"execute": "migrate-set-parameters", "arguments": {"multifd-channels": 7}});
    assert_eq!(answer(&subject, set.clone()), done);
    assert_eq!(migrate("tcp:host:1"), done);
    let Ok(Order::Migrate(order)) = orders.try_recv() else { panic!("it begins") };
    let (address, plan) = *order;
    assert_eq!((address.to_string(), plan.number("multifd-channels")), ("tcp:host:1".into(), 7));
    assert!(plan.has("multifd") && plan.has("postcopy-ram") && !plan.has("xbzrle"));
    // From here on it runs.
    assert_eq!(class(&migrate("tcp:host:1")), "GenericError");
    assert_eq!(class(&switch(&["xbzrle"])), "GenericError");
    assert_eq!(answer(&subject, set), done, "it is so already");
    assert!(orders.try_recv().is_err());
    assert_eq!(answer(&subject, json!({"execute": "quit"})), done);
    assert_eq!(orders.try_recv(), Ok(Order::Quit));
}

#[test]
fn each_side_has_the_commands_that_it_can_do() {
    let commands = |role: Role| {
        let subject =
            Subject::new(role, SharedStatistics::default(), Plan::default(), || CancelReply::Accepted);
        let told = answer(&subject, json!({"execute": "query-commands"}));
        let names: Vec<_> =
            told["return"].as_array().unwrap().iter().map(|row| row["name"].clone()).collect();
        let pause = answer(&subject, json!({"exec-oob": "migrate-pause"}));
        let known = names.contains(&json!("migrate-pause"));
        assert_eq!(class(&pause), if known { "GenericError" } else { "CommandNotFound" }, "{role:?}");
        names
    };
    let (source, relay, destination) =
        (commands(Role::Source), commands(Role::Relay), commands(Role::Destination));
    for (name, (at_source, at_relay, at_destination)) in [
        ("migrate", (true, false, false)),
        ("migrate-set-parameters", (true, true, false)),
        ("migrate_cancel", (true, true, true)),
    ] {
        let name = json!(name);
        let found = (source.contains(&name), relay.contains(&name), destination.contains(&name));
        assert_eq!(found, (at_source, at_relay, at_destination), "{name}");
    }
}

/// Every command that is there is described, by types that are there.
#[test]
fn the_schema_is_closed() {
    let subject = subject();
    let told = answer(&subject, json!({"execute": "query-qmp-schema"}));
    let all = told["return"].as_array().unwrap();
    let is_there = |name: &Value| all.iter().any(|entry| entry["name"] == *name);
    for entry in all {
        for reference in ["arg-type", "ret-type", "element-type"] {
            assert!(entry.get(reference).is_none_or(is_there), "{entry}");
        }
        for member in entry["members"].as_array().into_iter().flatten() {
            assert!(member.get("type").is_none_or(is_there), "{entry}");
        }
    }
    let commands = answer(&subject, json!({"execute": "query-commands"}));
    let commands = commands["return"].as_array().unwrap();
    assert!(commands.len() > 10);
    for command in commands {
        let described = all.iter().find(|entry| entry["name"] == command["name"]).unwrap();
        assert_eq!(described["meta-type"], "command");
    }
}
