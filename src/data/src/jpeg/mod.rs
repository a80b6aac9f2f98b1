//! A JPEG decoder whose pixels equal libjpeg-turbo's at its defaults: the accurate integer inverse transform and smooth
//! ("fancy") chroma upsampling. Pillow decodes with it, so a dataset trains on the same pixels here as there; decoders
//! with other arithmetic are off by half a level on average, which is several times the tolerance of the reference cases.
//!
//! Baseline, extended and progressive Huffman files of 8 bits with 1, 3 or 4 components. Arithmetic coding, lossless
//! and 12-bit files are refused, and so is damaged data that libjpeg would paper over with a warning.

mod color;
mod header;
mod huffman;
mod idct;
mod scan;
mod standard;

use header::{Frame, Reader, Segment};

pub(super) use header::Metadata;

/// Why a file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JpegError {
    /// The file ends too early.
    #[error("the file is truncated")]
    Truncated,
    /// The file breaks the format.
    #[error("damaged file: {0}")]
    Damaged(&'static str),
    /// A feature that this decoder lacks.
    #[error("unsupported: {0}")]
    Unsupported(&'static str),
}

/// Each scan costs a pass over the picture; real files have about ten.
const MAX_SCANS: usize = 500;

/// A file whose headers up to the first scan are read.
pub(super) struct JpegDecoder<'a> {
    reader: Reader<'a>,
    frame: Frame,
}

impl<'a> JpegDecoder<'a> {
    /// Reads the headers.
    pub(super) fn new(bytes: &'a [u8]) -> Result<Self, JpegError> {
        let mut reader = Reader::new(bytes)?;
        loop {
            match reader.next_segment()? {
                Segment::Frame(frame) => return Ok(Self { reader, frame }),
                Segment::Scan(_) => return Err(JpegError::Damaged("a scan before the frame header")),
                Segment::End => return Err(JpegError::Damaged("no picture")),
                Segment::Other => {}
            }
        }
    }

    /// Width and height as stored.
    pub(super) fn dimensions(&self) -> (u32, u32) {
        (u32::from(self.frame.width), u32::from(self.frame.height))
    }

    /// EXIF and XMP found before the frame header.
    pub(super) fn metadata(&self) -> &Metadata<'a> {
        &self.reader.metadata
    }

    /// Decodes all scans to RGB, `[height, width, 3]`.
    pub(super) fn decode(mut self) -> Result<Vec<u8>, JpegError> {
        let mut planes = scan::Planes::new(&self.frame)?;
        let mut scans = 0;
        loop {
            match self.reader.next_segment()? {
                Segment::Scan(header) => {
                    scans += 1;
                    if scans > MAX_SCANS {
                        return Err(JpegError::Unsupported("more than 500 scans"));
                    }
                    if !self.frame.progressive {
                        self.reader.tables.fill_in_standard()?;
                    }
                    let consumed = planes.decode_scan(&self.frame, &header, &self.reader.tables, self.reader.rest())?;
                    self.reader.skip(consumed);
                }
                Segment::Frame(_) => return Err(JpegError::Damaged("two frame headers")),
                Segment::End => break,
                Segment::Other => {}
            }
        }
        let samples = planes.finish(&self.frame, &self.reader.tables)?;
        Ok(color::to_rgb(&self.frame, self.reader.color(&self.frame), samples))
    }
}
