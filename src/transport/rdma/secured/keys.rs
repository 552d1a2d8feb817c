//! Keys of the queue pairs, from what both ends have sent over TLS: HMAC-SHA256 as in HKDF (RFC 5869), one block a key.

use rdma_hooks::FabricError;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hmac::{HMAC_SHA256, Key, sign};
use ring::rand::{SecureRandom as _, SystemRandom};

/// Random bytes that each end contributes.
pub(super) const SHARE_BYTES: usize = 32;
/// The private data of a connection that a proof covers: QEMU's part, and that part of the extension which is in use.
pub(super) const COVERED_BYTES: usize = 40;
/// Bytes of a proof, behind the covered ones.
pub(super) const PROOF_BYTES: usize = 16;
/// Bytes by which an encrypted message is longer.
pub(super) const TAG_BYTES: usize = 16;

/// One end's contribution.
pub(super) type Share = [u8; SHARE_BYTES];
/// The covered private data of one end of a connection.
pub(super) type Covered = [u8; COVERED_BYTES];

/// A contribution from the kernel's random numbers.
///
/// # Errors
/// The kernel has none.
pub(super) fn share() -> std::io::Result<Share> {
    let mut share = Share::default();
    SystemRandom::new().fill(&mut share).map_err(|_| std::io::Error::other("there are no random numbers"))?;
    Ok(share)
}

/// What only the two ends of the TLS connection know.
#[derive(Clone, Debug)]
pub(super) struct Secret(Key);

/// Which end encrypts a message.
#[derive(Clone, Copy, Debug)]
pub(super) enum From {
    Source,
    Destination,
}

impl Secret {
    pub(super) fn of(source: &Share, destination: &Share) -> Self {
        let salt = Key::new(HMAC_SHA256, b"ramwire: queue pairs beside TLS");
        Self(Key::new(HMAC_SHA256, sign(&salt, &[*source, *destination].concat()).as_ref()))
    }

    fn derive(&self, label: u8, parts: &[&[u8]]) -> [u8; 32] {
        let tag = sign(&self.0, &[&[label], parts.concat().as_slice()].concat());
        let mut key = [0; 32];
        key.copy_from_slice(tag.as_ref());
        key
    }

    fn proof(&self, label: u8, parts: &[&[u8]]) -> [u8; PROOF_BYTES] {
        let mut proof = [0; PROOF_BYTES];
        proof.copy_from_slice(&self.derive(label, parts)[..PROOF_BYTES]);
        proof
    }

    /// The proof that a request to connect is of this source.
    pub(super) fn of_request(&self, request: &Covered) -> [u8; PROOF_BYTES] {
        self.proof(1, &[request])
    }

    /// The proof that a reply to that request is of this destination.
    pub(super) fn of_reply(&self, request: &Covered, reply: &Covered) -> [u8; PROOF_BYTES] {
        self.proof(2, &[request, reply])
    }

    /// The cipher of the messages that one end sends on the connection of that request. A request is made and accepted only
    /// once, so no two connections share a key.
    ///
    /// # Errors
    /// [`FabricError::NotAuthentic`], never seen: the key has the cipher's length.
    pub(super) fn cipher(&self, from: From, request: &Covered) -> Result<Cipher, FabricError> {
        let key = self.derive(3 + from as u8, &[request]);
        let key = UnboundKey::new(&CHACHA20_POLY1305, &key);
        let key = key.map_err(|_| FabricError::NotAuthentic { what: "the key of a connection" })?;
        Ok(Cipher { key: LessSafeKey::new(key), messages: 0 })
    }
}

/// Compares without leaving the loop at the first difference.
pub(super) fn same(one: &[u8; PROOF_BYTES], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |unlike, (a, b)| unlike | a ^ b) == 0
}

/// Encrypts or decrypts the messages of one direction in their order. A queue pair loses and reorders none, so the number of a
/// message need not be sent. ChaCha20-Poly1305 keys may encrypt more messages than a migration has.
#[derive(Debug)]
pub(super) struct Cipher {
    key: LessSafeKey,
    messages: u64,
}

impl Cipher {
    fn nonce(&mut self) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[NONCE_LEN - 8..].copy_from_slice(&self.messages.to_be_bytes());
        self.messages += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// # Errors
    /// [`FabricError::NotAuthentic`], never seen: messages are shorter than 256 GiB.
    pub(super) fn seal(&mut self, message: &mut Vec<u8>) -> Result<(), FabricError> {
        let nonce = self.nonce();
        let sealed = self.key.seal_in_place_append_tag(nonce, Aad::empty(), message);
        sealed.map_err(|_| FabricError::NotAuthentic { what: "a message of this end" })
    }

    /// # Errors
    /// [`FabricError::NotAuthentic`]: it is not the message that the peer sent next.
    pub(super) fn open(&mut self, message: &mut Vec<u8>) -> Result<(), FabricError> {
        let nonce = self.nonce();
        let opened = self.key.open_in_place(nonce, Aad::empty(), message);
        let plain = opened.map(|plain| plain.len());
        message.truncate(plain.map_err(|_| FabricError::NotAuthentic { what: "a message" })?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn secret() -> Secret {
        Secret::of(&[1; 32], &[2; 32])
    }

    #[test]
    fn a_message_opens_once_in_its_place_and_direction() {
        let request = [7; COVERED_BYTES];
        let mut sent = secret().cipher(From::Source, &request).unwrap();
        let messages = [b"first".to_vec(), b"second".to_vec()].map(|mut message| {
            sent.seal(&mut message).unwrap();
            message
        });
        assert_eq!(messages[0].len(), 5 + TAG_BYTES);
        let opens = |cipher: &mut Cipher, message: &[u8]| {
            let mut message = message.to_vec();
            cipher.open(&mut message).map(|()| message)
        };
        let mut came = secret().cipher(From::Source, &request).unwrap();
        assert_eq!(opens(&mut came, &messages[0]).unwrap(), b"first");
        assert_eq!(opens(&mut came, &messages[1]).unwrap(), b"second");
        for (from, request, message) in [
            (From::Source, [7; COVERED_BYTES], &messages[1]),
            (From::Destination, [7; COVERED_BYTES], &messages[0]),
            (From::Source, [8; COVERED_BYTES], &messages[0]),
            (From::Source, [7; COVERED_BYTES], &Vec::new()),
        ] {
            opens(&mut secret().cipher(from, &request).unwrap(), message).unwrap_err();
        }
        let mut other = Secret::of(&[2; 32], &[1; 32]).cipher(From::Source, &request).unwrap();
        opens(&mut other, &messages[0]).unwrap_err();
    }

    #[test]
    fn a_proof_covers_every_bit_of_what_was_asked_and_granted() {
        let (request, reply) = ([3; COVERED_BYTES], [4; COVERED_BYTES]);
        let (of_request, of_reply) = (secret().of_request(&request), secret().of_reply(&request, &reply));
        for at in 0..COVERED_BYTES * 8 {
            let changed = |bytes: Covered| {
                let mut bytes = bytes;
                bytes[at / 8] ^= 1 << (at % 8);
                bytes
            };
            assert!(!same(&of_request, &secret().of_request(&changed(request))));
            assert!(!same(&of_reply, &secret().of_reply(&changed(request), &reply)));
            assert!(!same(&of_reply, &secret().of_reply(&request, &changed(reply))));
        }
        assert!(same(&of_request, &secret().of_request(&request)));
        assert!(same(&of_reply, &secret().of_reply(&request, &reply)));
        assert!(!same(&of_request, &[]) && !same(&of_request, &of_request[..15]));
    }
}
