//! The programs in docs/examples/ do what they say.
#![allow(clippy::unwrap_used)]

#[path = "../docs/examples/embed.rs"]
mod embed;

#[test]
fn the_embedding_example_moves_its_guest() {
    embed::main().unwrap();
}

#[test]
fn the_embedding_example_stays_short() {
    let lines = include_str!("../docs/examples/embed.rs").lines().count();
    assert!(lines < 80, "{lines} lines");
}
