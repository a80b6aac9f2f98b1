//! Markers and tables.

use super::JpegError;
use super::huffman::HuffmanTable;

/// A colour component of the frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Component {
    pub(super) id: u8,
    /// Horizontal sampling factor, 1 to 4.
    pub(super) h: usize,
    /// Vertical sampling factor, 1 to 4.
    pub(super) v: usize,
    /// Index of the quantization table.
    pub(super) table: usize,
}

/// The frame header.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub(super) progressive: bool,
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) components: Vec<Component>,
    pub(super) max_h: usize,
    pub(super) max_v: usize,
}

impl Frame {
    /// Minimum coded units per row and per column of an interleaved scan.
    pub(super) fn mcus(&self) -> (usize, usize) {
        (usize::from(self.width).div_ceil(8 * self.max_h), usize::from(self.height).div_ceil(8 * self.max_v))
    }

    /// Width and height of a component's real samples.
    pub(super) fn size_of(&self, component: &Component) -> (usize, usize) {
        let along = |length: u16, factor: usize, max: usize| (usize::from(length) * factor).div_ceil(max);
        (along(self.width, component.h, self.max_h), along(self.height, component.v, self.max_v))
    }
}

/// Tables of one component in a scan: index in the frame, DC table, AC table.
#[derive(Debug, Clone, Copy)]
pub(super) struct ScanComponent {
    pub(super) index: usize,
    pub(super) dc: usize,
    pub(super) ac: usize,
}

/// A scan header.
#[derive(Debug, Clone)]
pub(super) struct ScanHeader {
    pub(super) components: Vec<ScanComponent>,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) high: u32,
    pub(super) low: u32,
}

/// Tables in force.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// In natural (row-major) order.
    pub(super) quantization: [Option<[u16; 64]>; 4],
    pub(super) dc: [Option<HuffmanTable>; 4],
    pub(super) ac: [Option<HuffmanTable>; 4],
    pub(super) restart_interval: usize,
}

/// Segments with picture metadata.
#[derive(Debug, Default)]
pub(in super::super) struct Metadata<'a> {
    /// TIFF structure of the first EXIF segment.
    pub(in super::super) exif: Option<&'a [u8]>,
    /// The first XMP packet.
    pub(in super::super) xmp: Option<&'a [u8]>,
}

/// What a segment was.
pub(super) enum Segment {
    Frame(Frame),
    Scan(ScanHeader),
    End,
    Other,
}

/// How components make colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Color {
    Gray,
    Rgb,
    YCbCr,
    /// Stored inverted, as Adobe does.
    Cmyk,
    Ycck,
}

/// Walks the segments.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    pub(super) tables: Tables,
    pub(super) metadata: Metadata<'a>,
    jfif: bool,
    adobe_transform: Option<u8>,
}

/// Natural position of the k-th coefficient of the zigzag.
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29,
    22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, JpegError> {
        if !bytes.starts_with(&[0xFF, 0xD8]) {
            return Err(JpegError::Damaged("no start of image"));
        }
        Ok(Self { bytes, at: 2, tables: Tables::default(), metadata: Metadata::default(), jfif: false, adobe_transform: None })
    }

    /// What follows.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    pub(super) fn skip(&mut self, count: usize) {
        self.at += count;
    }

    /// libjpeg's guess of the colour space.
    pub(super) fn color(&self, frame: &Frame) -> Color {
        let ids: Vec<u8> = frame.components.iter().map(|c| c.id).collect();
        match (ids.as_slice(), self.jfif, self.adobe_transform) {
            ([_], ..) => Color::Gray,
            ([_, _, _], false, Some(0)) | ([b'R', b'G', b'B'], false, None) => Color::Rgb,
            ([_, _, _], ..) => Color::YCbCr,
            (_, _, None | Some(0)) => Color::Cmyk,
            _ => Color::Ycck,
        }
    }

    /// Reads one segment, storing tables and metadata.
    pub(super) fn next_segment(&mut self) -> Result<Segment, JpegError> {
        let marker = self.next_marker()?;
        if marker == 0xD9 {
            return Ok(Segment::End);
        }
        if matches!(marker, 0x01 | 0xD0..=0xD7) {
            return Ok(Segment::Other);
        }
        let length = match *self.rest() {
            [high, low, ..] => usize::from(u16::from_be_bytes([high, low])),
            _ => return Err(JpegError::Truncated),
        };
        let body = self.rest().get(2..length.max(2)).ok_or(JpegError::Truncated)?;
        if length < 2 {
            return Err(JpegError::Damaged("a segment of negative length"));
        }
        self.at += length;
        match marker {
            0xC0..=0xC2 => return Ok(Segment::Frame(frame(marker == 0xC2, body)?)),
            0xC3 | 0xC5..=0xC7 => return Err(JpegError::Unsupported("lossless or hierarchical JPEG")),
            0xC9..=0xCB | 0xCD..=0xCF => return Err(JpegError::Unsupported("arithmetic coding")),
            0xC4 => self.huffman_tables(body)?,
            0xDA => return Ok(Segment::Scan(scan(body)?)),
            0xDB => self.quantization_tables(body)?,
            0xDD => {
                let bytes = body.first_chunk().ok_or(JpegError::Truncated)?;
                self.tables.restart_interval = usize::from(u16::from_be_bytes(*bytes));
            }
            0xE0 if body.starts_with(b"JFIF\0") => self.jfif = true,
            0xE1 => self.application1(body),
            0xEE if body.starts_with(b"Adobe") && body.len() >= 12 => self.adobe_transform = Some(body[11]),
            _ => {}
        }
        Ok(Segment::Other)
    }

    /// The second byte of the next marker; stray bytes before it are skipped, as in libjpeg.
    fn next_marker(&mut self) -> Result<u8, JpegError> {
        loop {
            let start = self.rest().iter().position(|b| *b == 0xFF).ok_or(JpegError::Truncated)?;
            let code = self.rest()[start..].iter().position(|b| *b != 0xFF).ok_or(JpegError::Truncated)? + start;
            let marker = self.rest()[code];
            self.at += code + 1;
            if marker != 0 {
                return Ok(marker);
            }
        }
    }

    fn application1(&mut self, body: &'a [u8]) {
        if let Some(exif) = body.strip_prefix(b"Exif\0\0") {
            self.metadata.exif.get_or_insert(exif);
        } else if let Some(xmp) = body.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
            self.metadata.xmp.get_or_insert(xmp);
        }
    }

    fn quantization_tables(&mut self, mut body: &[u8]) -> Result<(), JpegError> {
        while let [head, rest @ ..] = body {
            let wide = usize::from(head >> 4);
            let slot = self.tables.quantization.get_mut(usize::from(head & 15)).ok_or(JpegError::Damaged("quantization table number"))?;
            if wide > 1 {
                return Err(JpegError::Damaged("quantization table precision"));
            }
            let (values, after) = rest.split_at_checked(64 * (wide + 1)).ok_or(JpegError::Truncated)?;
            let mut table = [0; 64];
            for (k, value) in values.chunks_exact(wide + 1).enumerate() {
                table[usize::from(ZIGZAG[k])] = value.iter().fold(0, |v, b| v << 8 | u16::from(*b));
            }
            *slot = Some(table);
            body = after;
        }
        Ok(())
    }

    fn huffman_tables(&mut self, mut body: &[u8]) -> Result<(), JpegError> {
        while let [head, rest @ ..] = body {
            let (counts, rest) = rest.split_first_chunk::<16>().ok_or(JpegError::Truncated)?;
            let total = counts.iter().map(|c| usize::from(*c)).sum();
            let (symbols, after) = rest.split_at_checked(total).ok_or(JpegError::Truncated)?;
            let slots = if head >> 4 == 0 { &mut self.tables.dc } else { &mut self.tables.ac };
            let slot = slots.get_mut(usize::from(head & 15)).ok_or(JpegError::Damaged("Huffman table number"))?;
            *slot = Some(HuffmanTable::new(counts, symbols)?);
            body = after;
        }
        Ok(())
    }
}

fn frame(progressive: bool, body: &[u8]) -> Result<Frame, JpegError> {
    let ([precision, h1, h0, w1, w0, count], rest) = body.split_first_chunk::<6>().ok_or(JpegError::Truncated)?;
    if *precision != 8 {
        return Err(JpegError::Unsupported("samples of other than 8 bits"));
    }
    if !matches!(count, 1 | 3 | 4) {
        return Err(JpegError::Unsupported("other than 1, 3 or 4 components"));
    }
    let parts = rest.get(..usize::from(*count) * 3).ok_or(JpegError::Truncated)?;
    let mut components = Vec::new();
    for part in parts.as_chunks::<3>().0 {
        let [id, sampling, table] = *part;
        let component = Component { id, h: usize::from(sampling >> 4), v: usize::from(sampling & 15), table: usize::from(table) };
        if !(1..=4).contains(&component.h) || !(1..=4).contains(&component.v) || component.table > 3 {
            return Err(JpegError::Damaged("sampling factors or table number"));
        }
        components.push(component);
    }
    if let [only] = components.as_mut_slice() {
        // A single component is never subsampled.
        (only.h, only.v) = (1, 1);
    }
    let max_h = components.iter().map(|c| c.h).max().unwrap_or(1);
    let max_v = components.iter().map(|c| c.v).max().unwrap_or(1);
    if components.iter().any(|c| max_h % c.h != 0 || max_v % c.v != 0) {
        return Err(JpegError::Unsupported("fractional sampling factors"));
    }
    Ok(Frame { progressive, width: u16::from_be_bytes([*w1, *w0]), height: u16::from_be_bytes([*h1, *h0]), components, max_h, max_v })
}

/// The component selectors are resolved when the frame is at hand; until then `index` holds the identifier.
fn scan(body: &[u8]) -> Result<ScanHeader, JpegError> {
    let (count, rest) = body.split_first().ok_or(JpegError::Truncated)?;
    let (parts, rest) = rest.split_at_checked(usize::from(*count) * 2).ok_or(JpegError::Truncated)?;
    let [start, end, approximation] = *rest.first_chunk().ok_or(JpegError::Truncated)?;
    if !(1..=4).contains(count) || end > 63 || start > end || parts.iter().skip(1).step_by(2).any(|t| t >> 4 > 3 || t & 15 > 3) {
        return Err(JpegError::Damaged("scan header"));
    }
    let components =
        parts.as_chunks::<2>().0.iter().map(|[id, t]| ScanComponent { index: usize::from(*id), dc: usize::from(t >> 4), ac: usize::from(t & 15) }).collect();
    let (high, low) = (u32::from(approximation >> 4), u32::from(approximation & 15));
    if high > 13 || low > 13 {
        return Err(JpegError::Damaged("successive approximation"));
    }
    Ok(ScanHeader { components, start: usize::from(start), end: usize::from(end), high, low })
}
