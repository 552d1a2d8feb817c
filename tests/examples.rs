//! The programs in docs/examples/ work as described.
#![allow(clippy::unwrap_used)]

#[path = "../docs/examples/embed.rs"]
mod embed;

#[test]
fn the_embedding_example_moves_its_guest() {
    embed::main().unwrap();
}

#[test]
fn the_embedding_example_can_be_read_in_one_go() {
    let lines = include_str!("../docs/examples/embed.rs").lines().count();
    assert!((100..=150).contains(&lines), "{lines} lines");
}

#[test]
fn the_code_in_the_readme_is_the_example_s() {
    let readme = include_str!("../README.md");
    let (_, rest) = readme.split_once("```rust\n").unwrap();
    let (code, _) = rest.split_once("```").unwrap();
    assert!(
        include_str!("../docs/examples/embed.rs").contains(code),
        "README.md has other code than embed.rs"
    );
}
