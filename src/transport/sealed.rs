//! Links and byte streams are implemented only by this library: an embedder passes connections, not implementations.

/// Keeps implementations of [`ByteSink`](super::ByteSink), [`ByteSource`](super::ByteSource),
/// [`SourceLink`](super::SourceLink) and [`DestinationLink`](super::DestinationLink) inside the library, so that
/// methods can be added to them. Feature `testing` exposes it.
pub trait Sealed {}
