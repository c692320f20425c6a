//! CRC32C, as everything here is checked with it.

use crc_fast::{CrcAlgorithm, Digest};

/// Of 32 bits; the crate's type holds longer ones, too.
const KIND: CrcAlgorithm = CrcAlgorithm::Crc32Iscsi;

pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(KIND, bytes) as u32
}

/// Of `seed` and then `bytes`: what speaks of one thing does not pass for another's.
pub fn seeded(seed: &[u8], bytes: &[u8]) -> u32 {
    let mut digest = Digest::new(KIND);
    digest.update(seed);
    digest.update(bytes);
    digest.finalize() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_crc32c_of_rfc_3720() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        // RFC 3720, B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(seeded(b"1234", b"56789"), crc32c(b"123456789"));
    }
}
