//! Which page is next, and how it is sent.

mod search;
mod verdict;

pub use search::PageSearch;
pub use verdict::{ZeroDetection, classify};
