//! `occyctl`: the command line.
fn main() {}
