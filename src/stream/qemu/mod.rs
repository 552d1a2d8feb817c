//! QEMU's migration stream.
//!
//! | file | what of the stream |
//! |------|--------------------|
//! | [`mod@file`] | header and configuration |
//! | [`section`] | section headers, footers, end of file |
//! | [`command`] | commands to the destination |
//! | [`ram`] | records of the `ram` section |
//! | [`blocks`] | the list of RAM blocks |
//! | [`mapped`], [`mapped_stream`] | fixed page offsets in a file (mapped-ram), and the stream around them |
//! | [`compressed`] | pages as zlib streams |
//! | [`cpr`] | the names of descriptors that are passed ahead of a migration (cpr-transfer) |
//! | [`early`] | sections other than RAM that must be skipped |
//! | [`tail`], [`vmdesc`], [`state`] | device sections: where they end, how they are split and stored |
//! | [`multifd`], [`page_compression`], [`channel`] | packets of the multifd channels, their compression, and one such channel |
//! | [`package`] | the device state of a switchover to postcopy |
//! | [`return_path`] | messages back to the source |
//! | [`style`] | differences between senders |
//! | [`incoming`] | all of it in order: a whole stream on one channel |
//! | [`colo`] | the same with checkpoints behind it (COLO) |

pub mod blocks;
pub mod channel;
pub mod colo;
pub mod command;
pub mod compressed;
pub mod cpr;
pub mod early;
pub mod file;
pub mod incoming;
pub mod mapped;
pub mod mapped_stream;
pub mod multifd;
pub mod own_devices;
pub mod package;
pub mod packet_numbers;
pub mod page_compression;
pub mod ram;
pub mod return_path;
pub mod section;
pub mod state;
pub mod style;
pub mod tail;
pub mod vmdesc;
