//! Entropy-coded data: bits and Huffman codes (ITU-T T.81, annex F).

use super::JpegError;

/// Codes up to this length are found with one lookup.
const FAST_BITS: u32 = 9;

/// A Huffman table.
#[derive(Debug, Clone)]
pub(super) struct HuffmanTable {
    /// `length << 8 | symbol` by the next `FAST_BITS` bits; 0 where the code is longer.
    fast: Vec<u16>,
    /// First code beyond those of each length, aligned to 16 bits.
    limits: [u32; 17],
    /// Index of the symbol minus the code, per length.
    offsets: [i32; 17],
    symbols: Vec<u8>,
}

impl HuffmanTable {
    pub(super) fn new(counts: &[u8; 16], symbols: &[u8]) -> Result<Self, JpegError> {
        let mut table = Self { fast: vec![0; 1 << FAST_BITS], limits: [0; 17], offsets: [0; 17], symbols: symbols.to_vec() };
        let (mut code, mut index) = (0_u32, 0_usize);
        for length in 1..=16_u32 {
            let count = u32::from(counts[length as usize - 1]);
            table.offsets[length as usize] = index as i32 - code as i32;
            if code + count > 1 << length {
                return Err(JpegError::Damaged("Huffman table"));
            }
            for _ in 0..count {
                if length <= FAST_BITS {
                    let spread = 1 << (FAST_BITS - length);
                    let first = (code as usize) * spread;
                    table.fast[first..first + spread].fill((length as u16) << 8 | u16::from(symbols[index]));
                }
                code += 1;
                index += 1;
            }
            table.limits[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Ok(table)
    }
}

/// Reads bits up to the next marker.
pub(super) struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
    buffer: u64,
    /// Real bits in the buffer, at its low end.
    count: u32,
    /// Zero bits appended beyond the data.
    padding: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, buffer: 0, count: 0, padding: 0 }
    }

    /// Makes at least 32 bits available, with zeros after the end of the data.
    fn refill(&mut self) {
        while self.count <= 48 {
            let byte = match self.bytes.get(self.at) {
                Some(0xFF) if self.bytes.get(self.at + 1) == Some(&0) => {
                    self.at += 2;
                    0xFF
                }
                Some(0xFF) | None => {
                    self.padding += 8;
                    0
                }
                Some(byte) => {
                    self.at += 1;
                    *byte
                }
            };
            self.buffer = self.buffer << 8 | u64::from(byte);
            self.count += 8;
        }
    }

    fn peek16(&self) -> u32 {
        (self.buffer >> (self.count - 16)) as u32 & 0xFFFF
    }

    fn consume(&mut self, bits: u32) -> Result<(), JpegError> {
        self.count -= bits;
        if self.count < self.padding {
            return Err(if self.at >= self.bytes.len() { JpegError::Truncated } else { JpegError::Damaged("a scan ends too early") });
        }
        Ok(())
    }

    /// The next symbol.
    pub(super) fn symbol(&mut self, table: &HuffmanTable) -> Result<u8, JpegError> {
        if self.count < 32 {
            self.refill();
        }
        let next = self.peek16();
        let fast = table.fast[(next >> (16 - FAST_BITS)) as usize];
        if fast != 0 {
            self.consume(u32::from(fast >> 8))?;
            return Ok(fast as u8);
        }
        let length = (FAST_BITS + 1..=16).find(|l| next < table.limits[*l as usize]).ok_or(JpegError::Damaged("Huffman code"))?;
        let index = (next >> (16 - length)) as i32 + table.offsets[length as usize];
        self.consume(length)?;
        table.symbols.get(index as usize).copied().ok_or(JpegError::Damaged("Huffman code"))
    }

    /// The next `count` bits (at most 16) as a number.
    pub(super) fn bits(&mut self, count: u32) -> Result<u32, JpegError> {
        if count == 0 {
            return Ok(0);
        }
        if self.count < 32 {
            self.refill();
        }
        let value = self.peek16() >> (16 - count);
        self.consume(count)?;
        Ok(value)
    }

    /// The next `count` bits as a signed difference (T.81 F.2.2.1, EXTEND).
    pub(super) fn extend(&mut self, count: u32) -> Result<i32, JpegError> {
        let value = self.bits(count)? as i32;
        Ok(if count > 0 && value < 1 << (count - 1) { value - (1 << count) + 1 } else { value })
    }

    /// Goes on after the restart marker that must follow.
    pub(super) fn restart(&mut self) -> Result<(), JpegError> {
        let mut at = self.at;
        while self.bytes.get(at) == Some(&0xFF) && self.bytes.get(at + 1) == Some(&0xFF) {
            at += 1;
        }
        match self.bytes.get(at..at + 2) {
            Some([0xFF, 0xD0..=0xD7]) => {
                *self = Self { bytes: self.bytes, at: at + 2, buffer: 0, count: 0, padding: 0 };
                Ok(())
            }
            Some(_) => Err(JpegError::Damaged("a restart marker is missing")),
            None => Err(JpegError::Truncated),
        }
    }

    /// Bytes read so far; at the end of a scan, up to its marker (or to data bytes that are left over).
    pub(super) fn position(&self) -> usize {
        self.at
    }
}
