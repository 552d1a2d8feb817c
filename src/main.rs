//! The command `ramwire`.

fn main() {}
