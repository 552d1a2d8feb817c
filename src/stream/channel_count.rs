//! Exchange of the number of page channels between two ramwires.

/// A source and a destination with different numbers of page channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the source has {} and the destination {}; give both ends the same number of page channels",
    channels(*at_source), *at_destination
)]
pub struct ChannelMismatch {
    /// The source's number.
    pub at_source: u8,
    /// The destination's number.
    pub at_destination: u8,
}

fn channels(count: u8) -> String {
    if count == 1 { "1 page channel".into() } else { format!("{count} page channels") }
}

/// # Errors
/// [`ChannelMismatch`]: the pages of surplus channels would not be read, or the destination would wait for channels
/// that do not exist.
pub fn agree_on_channels(at_source: u8, at_destination: u8) -> Result<(), ChannelMismatch> {
    if at_source == at_destination { Ok(()) } else { Err(ChannelMismatch { at_source, at_destination }) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn both_numbers_are_named() {
        let mismatch = agree_on_channels(2, 1).unwrap_err();
        assert!(mismatch.to_string().starts_with("the source has 2 page channels and the destination 1;"));
        let mismatch = agree_on_channels(1, 2).unwrap_err();
        assert!(mismatch.to_string().starts_with("the source has 1 page channel and the destination 2;"));
        assert_eq!(agree_on_channels(3, 3), Ok(()));
    }
}
