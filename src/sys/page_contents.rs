//! Contents that pages are placed with: bytes of this program, or memory that a device has filled.

use super::HostSpan;

/// Contents of pages that are to be placed.
#[derive(Clone, Copy, Debug)]
pub enum PageContents<'a> {
    /// Bytes of this program.
    Bytes(&'a [u8]),
    /// Memory that a device has filled. The kernel copies it from there.
    Memory(HostSpan<'a>),
}

impl<'a> PageContents<'a> {
    /// Bytes.
    pub fn len(self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Memory(span) => span.len(),
        }
    }

    /// A part; `None` if it is not inside.
    pub fn part(self, offset: usize, len: usize) -> Option<Self> {
        match self {
            Self::Bytes(bytes) => bytes.get(offset..offset.checked_add(len)?).map(Self::Bytes),
            Self::Memory(span) => span.part(offset, len).map(Self::Memory),
        }
    }

    /// Valid for [`len`](Self::len) bytes while the contents are borrowed. Nobody may take a reference to them.
    pub(super) fn as_ptr(self) -> *const u8 {
        match self {
            Self::Bytes(bytes) => bytes.as_ptr(),
            Self::Memory(span) => span.as_ptr(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::Mapping;

    #[test]
    fn parts_stay_inside() {
        let memory = Mapping::anonymous(8192).unwrap();
        let span = memory.region().span(0, 8192).unwrap();
        for contents in [PageContents::Bytes(&[0; 8192]), PageContents::Memory(span)] {
            assert_eq!(contents.len(), 8192);
            let part = contents.part(4096, 4096).unwrap();
            assert_eq!((part.len(), part.as_ptr() as usize), (4096, contents.as_ptr() as usize + 4096));
            assert!(contents.part(4096, 4097).is_none() && contents.part(8193, 0).is_none());
            assert!(contents.part(usize::MAX, 2).is_none());
        }
    }
}
