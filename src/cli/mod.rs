//! The command: the library's interface for people.
#![allow(unreachable_pub)]

mod args;
mod bench;
mod common;
mod converge;
mod ctl;
mod demo;
mod devices;
mod guardian;
mod inspect;
mod limits;
mod local_socket;
mod metrics;
mod output;
mod pager;
#[allow(dead_code, reason = "shared by the reports that draw")]
mod plot;
mod postcopy;
mod progress;
mod qmp;
mod receive;
mod relay;
mod remedies;
mod render;
mod report;
mod send;
mod serve;
mod service;
mod signals;
mod sizes;
mod slow_link;
mod store;
mod tls;
mod verify;
mod watch;

pub use args::run;
