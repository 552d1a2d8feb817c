//! Links and byte streams are this library's own: an embedder hands in connections, not implementations.

/// Keeps implementations of [`ByteSink`](super::ByteSink), [`ByteSource`](super::ByteSource),
/// [`SourceLink`](super::SourceLink) and [`DestinationLink`](super::DestinationLink) inside the library, so that methods
/// can be added to them. Feature `testing` shows it.
pub trait Sealed {}
