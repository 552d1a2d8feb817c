//! Which page is next, and as what it travels.

mod search;
mod verdict;

pub use search::PageSearch;
pub use verdict::{ZeroDetection, classify};
