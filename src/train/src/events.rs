//! TensorBoard event files: TFRecord framing (length and masked CRC-32C) around `Event` protocol buffers.
//!
//! Only what scalars and pictures need is written. Formats: TensorFlow's `record_writer.h` and `event.proto`, `summary.proto`.

/// The name of an event file: TensorBoard looks for `tfevents` in it.
pub fn file_name(unix_seconds: u64, host: &str) -> String {
    format!("events.out.tfevents.{unix_seconds:010}.{host}")
}

/// The host in the names of this program's event files: which machine wrote one does not matter.
pub const HOST: &str = "finetune";

/// Whether `name` is one that [`file_name`] gives.
pub fn is_file_name(name: &str, host: &str) -> bool {
    let seconds = name.strip_prefix("events.out.tfevents.").and_then(|rest| rest.split_once('.')).and_then(|(seconds, _)| seconds.parse().ok());
    seconds.is_some_and(|seconds| file_name(seconds, host) == name)
}

/// One value of a summary.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// A number.
    Scalar(f32),
    /// A PNG file with its size in pixels.
    Picture {
        /// Encoded PNG.
        png: &'a [u8],
        /// Pixels.
        width: u32,
        /// Pixels.
        height: u32,
    },
}

/// The record that must open every event file.
pub fn header(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    double(&mut event, 1, wall_time);
    bytes(&mut event, 3, b"brain.Event:2");
    record(&event)
}

/// One event: values by tag at `step`; `wall_time` is seconds since 1970.
pub fn summary(wall_time: f64, step: u64, values: &[(&str, Value<'_>)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut entry = Vec::new();
        bytes(&mut entry, 1, tag.as_bytes());
        match value {
            Value::Scalar(x) => {
                key(&mut entry, 2, WIRE_32);
                entry.extend_from_slice(&x.to_le_bytes());
            }
            Value::Picture { png, width, height } => {
                let mut picture = Vec::new();
                integer(&mut picture, 1, u64::from(*height));
                integer(&mut picture, 2, u64::from(*width));
                // 3: RGB.
                integer(&mut picture, 3, 3);
                bytes(&mut picture, 4, png);
                bytes(&mut entry, 4, &picture);
            }
        }
        bytes(&mut summary, 1, &entry);
    }
    let mut event = Vec::new();
    double(&mut event, 1, wall_time);
    integer(&mut event, 2, step);
    bytes(&mut event, 5, &summary);
    record(&event)
}

/// `data` in TFRecord framing.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend_from_slice(&length);
    out.extend_from_slice(&masked_crc(&length).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked_crc(data).to_le_bytes());
    out
}

const WIRE_VARINT: u64 = 0;
const WIRE_64: u64 = 1;
const WIRE_BYTES: u64 = 2;
const WIRE_32: u64 = 5;

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn key(out: &mut Vec<u8>, field: u64, wire: u64) {
    varint(out, field << 3 | wire);
}

fn integer(out: &mut Vec<u8>, field: u64, value: u64) {
    key(out, field, WIRE_VARINT);
    varint(out, value);
}

fn double(out: &mut Vec<u8>, field: u64, value: f64) {
    key(out, field, WIRE_64);
    out.extend_from_slice(&value.to_le_bytes());
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(out, field, WIRE_BYTES);
    varint(out, value.len() as u64);
    out.extend_from_slice(value);
}

/// TensorFlow's masking, which keeps checksums of data that itself holds checksums apart.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78).
fn crc32c(data: &[u8]) -> u32 {
    !data.iter().fold(!0_u32, |crc, byte| (crc >> 8) ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize])
}

static TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 3720, appendix B.4, and the customary check value.
    #[test]
    fn crc32c_known_answers() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
    }

    /// `tensorboard.compat.proto.event_pb2.Event(wall_time=1.5, step=300, summary=Summary(value=[Value(tag="loss", simple_value=0.25)])).SerializeToString()`.
    #[test]
    fn a_scalar_event_is_the_bytes_of_protobuf() {
        let bytes = summary(1.5, 300, &[("loss", Value::Scalar(0.25))]);
        let event = &bytes[12..bytes.len() - 4];
        assert_eq!(hex::encode(event), "09000000000000f83f10ac022a0d0a0b0a046c6f7373150000803e");
        assert_eq!(bytes[..8], (event.len() as u64).to_le_bytes());
        assert_eq!(bytes[8..12], masked_crc(&bytes[..8]).to_le_bytes());
        assert_eq!(bytes[bytes.len() - 4..], masked_crc(event).to_le_bytes());
    }
}
