//! The captured streams and the expected results in their manifest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// Expected result of decoding a capture.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Promise {
    pub(crate) file: Option<String>,
    #[serde(default)]
    pub(crate) raw_len: usize,
    #[serde(default)]
    pub(crate) raw_sha256: String,
    pub(crate) machine: Option<String>,
    pub(crate) ram_section_id: Option<u32>,
    pub(crate) first_device_offset: Option<u64>,
    #[serde(default)]
    pub(crate) counts: BTreeMap<String, u64>,
    #[serde(default)]
    pub(crate) devices: Vec<Device>,
    pub(crate) blocks: Option<BTreeMap<String, Block>>,
    #[serde(default)]
    pub(crate) parts: Vec<Part>,
    #[serde(default)]
    pub(crate) channels: Vec<Part>,
    #[serde(default)]
    pub(crate) channel_summary: Vec<ChannelSummary>,
    pub(crate) barriers: Option<u64>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ChannelSummary {
    pub(crate) id: u8,
    pub(crate) normal: u64,
    pub(crate) zero: u64,
    pub(crate) sync: u64,
}

#[derive(Debug, Deserialize, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) name: String,
    pub(crate) instance: u32,
    pub(crate) section_id: u32,
    pub(crate) version: u32,
    pub(crate) payload_len: usize,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Block {
    pub(crate) len: usize,
    pub(crate) sha256: String,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Part {
    pub(crate) file: String,
    pub(crate) raw_len: usize,
    pub(crate) raw_sha256: String,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors")
}

/// All expected results by name of the capture.
pub(crate) fn manifest() -> BTreeMap<String, Promise> {
    serde_json::from_reader(File::open(folder().join("manifest.json")).unwrap()).unwrap()
}

/// Captures of one complete stream on one file: including the main channel of multifd, without postcopy.
pub(crate) fn whole_streams() -> Vec<(String, Promise, Vec<u8>)> {
    let whole = manifest().into_iter().filter(|(_, promise)| promise.file.is_some());
    whole
        .map(|(name, promise)| {
            let bytes = read(promise.file.as_deref().unwrap());
            (name, promise, bytes)
        })
        .collect()
}

/// The uncompressed bytes of a capture.
pub(crate) fn read(file: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let packed = File::open(folder().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
    GzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
    bytes
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
