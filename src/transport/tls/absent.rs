//! In a program that was built without TLS: it can be requested, and is refused.

use std::convert::Infallible;
use std::io;
use std::os::fd::BorrowedFd;

use super::{TlsError, TlsOptions};
use crate::sys::RecvPart;

/// TLS settings of an end: no connection can be made.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Tls(Infallible);

impl Tls {
    /// For a source, which is the client.
    ///
    /// # Errors
    /// [`TlsError::NotBuilt`].
    pub fn of_source(_options: &TlsOptions) -> Result<Self, TlsError> {
        Err(TlsError::NotBuilt)
    }

    /// For a destination, which is the server.
    ///
    /// # Errors
    /// [`TlsError::NotBuilt`].
    pub fn of_destination(_options: &TlsOptions) -> Result<Self, TlsError> {
        Err(TlsError::NotBuilt)
    }

    pub(in crate::transport) fn session(&self, _host: &str) -> Result<TlsSession, TlsError> {
        match self.0 {}
    }
}

/// No connection.
#[derive(Debug)]
pub(in crate::transport) struct TlsSession(Infallible);

impl TlsSession {
    pub(in crate::transport) fn is_open(&self) -> bool {
        match self.0 {}
    }

    pub(in crate::transport) fn shake_hands(&self, _fd: BorrowedFd<'_>) -> io::Result<bool> {
        match self.0 {}
    }

    pub(in crate::transport) fn encrypt(&self, _plain: &[u8]) -> io::Result<()> {
        match self.0 {}
    }

    pub(in crate::transport) fn push(&self, _fd: BorrowedFd<'_>) -> io::Result<bool> {
        match self.0 {}
    }

    pub(in crate::transport) fn close(&self) {
        match self.0 {}
    }

    pub(in crate::transport) fn why_broken(&self, _fd: BorrowedFd<'_>) -> Option<io::Error> {
        match self.0 {}
    }

    pub(in crate::transport) fn recv(
        &self,
        _fd: BorrowedFd<'_>,
        _into: &mut [RecvPart<'_>],
    ) -> io::Result<usize> {
        match self.0 {}
    }

    pub(in crate::transport) fn peek(&self, _fd: BorrowedFd<'_>, _into: &mut [u8]) -> io::Result<usize> {
        match self.0 {}
    }
}
