//! Pictures from files: PNG, JPEG, WebP, BMP, GIF and TIFF to upright 8-bit RGB, as `ImageOps.exif_transpose(image).convert("RGB")` of Pillow.

use std::io::Cursor;

use image::codecs::{bmp::BmpDecoder, gif::GifDecoder, png::PngDecoder, tiff::TiffDecoder, webp::WebPDecoder};
use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ExtendedColorType, ImageDecoder, ImageFormat};

use super::jpeg::JpegDecoder;
pub use super::jpeg::JpegError;
use super::{png_exif, sniff, tiff};

/// What a file may ask for before it is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Largest width times height.
    pub max_pixels: u64,
    /// Largest width or height.
    pub max_side: u32,
}

impl Default for ImageLimits {
    /// 100 million pixels, 32,768 on a side.
    fn default() -> Self {
        Self { max_pixels: 100_000_000, max_side: 1 << 15 }
    }
}

/// Why a file gives no picture.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No format that is read.
    #[error("not a PNG, JPEG, WebP, BMP, GIF or TIFF file, but {0}")]
    UnknownFormat(&'static str),
    /// Larger than the limits allow.
    #[error("{width}x{height} pixels are more than the limit of {max_pixels} pixels and {max_side} a side")]
    TooLarge {
        /// Stored width.
        width: u32,
        /// Stored height.
        height: u32,
        /// The limit.
        max_pixels: u64,
        /// The limit.
        max_side: u32,
    },
    /// The file is shorter than it says.
    #[error("the file is truncated")]
    Truncated,
    /// Colours whose conversion is not that of the reference.
    #[error("{0} is not read: convert the file to PNG")]
    Color(&'static str),
    /// No pixels.
    #[error("the picture has no pixels")]
    Empty,
    /// The JPEG file is damaged or uses a feature that the decoder lacks.
    #[error("failed to decode JPEG")]
    Jpeg(#[from] JpegError),
    /// The file is damaged or uses a feature that the decoder lacks.
    #[error("failed to decode {format}")]
    Decode {
        /// The format's name.
        format: &'static str,
        /// The decoder's error.
        #[source]
        source: image::ImageError,
    },
}

/// An upright 8-bit RGB picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// `[height, width, 3]`, row-major.
    pub data: Vec<u8>,
}

/// Decodes a file's bytes, turns the picture upright and drops alpha.
///
/// # Errors
/// If the bytes are not a whole file of one of the formats, within the limits. Dimensions are checked before pixels are decoded.
pub fn decode(bytes: &[u8], limits: &ImageLimits) -> Result<RgbImage, ImageError> {
    decode_seen(bytes, limits).map(|(picture, _)| picture)
}

/// As [`decode`], and whether the picture has transparent parts.
pub(super) fn decode_seen(bytes: &[u8], limits: &ImageLimits) -> Result<(RgbImage, bool), ImageError> {
    match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => {
            let bounds = image_limits(limits);
            read(PngDecoder::with_limits(Cursor::new(bytes), bounds), "PNG", limits, png_exif::raw_profile(bytes))
        }
        Ok(ImageFormat::Jpeg) => Ok((read_jpeg(bytes, limits)?, false)),
        Ok(ImageFormat::WebP) => {
            check_riff_size(bytes)?;
            read(WebPDecoder::new(Cursor::new(bytes)), "WebP", limits, None)
        }
        // Bits per pixel; scaled to 8 bits they would not be Pillow's.
        Ok(ImageFormat::Bmp) if bytes.get(28..30) == Some(&[16, 0]) => Err(ImageError::Color("a BMP file of 16 bits per pixel")),
        Ok(ImageFormat::Bmp) => read(BmpDecoder::new(Cursor::new(bytes)), "BMP", limits, None),
        Ok(ImageFormat::Gif) => read(GifDecoder::new(Cursor::new(bytes)), "GIF", limits, None),
        // JPEG, in its old and its new form: decoded by other arithmetic than libjpeg-turbo's.
        Ok(ImageFormat::Tiff) if matches!(tiff::compression(bytes), Some(6 | 7)) => Err(ImageError::Color("a TIFF file with JPEG inside")),
        Ok(ImageFormat::Tiff) => read(TiffDecoder::new(Cursor::new(bytes)), "TIFF", limits, None),
        _ => Err(ImageError::UnknownFormat(sniff::what(bytes))),
    }
}

/// The stored (not yet upright) width and height, from the headers alone.
///
/// # Errors
/// As [`decode`], for what the headers show.
pub fn probe(bytes: &[u8], limits: &ImageLimits) -> Result<(u32, u32), ImageError> {
    let failed = |format| move |source| ImageError::Decode { format, source };
    let size = match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => PngDecoder::with_limits(Cursor::new(bytes), image_limits(limits)).map_err(failed("PNG"))?.dimensions(),
        Ok(ImageFormat::Jpeg) => JpegDecoder::new(bytes)?.dimensions(),
        Ok(ImageFormat::WebP) => WebPDecoder::new(Cursor::new(bytes)).map_err(failed("WebP"))?.dimensions(),
        Ok(ImageFormat::Bmp) => BmpDecoder::new(Cursor::new(bytes)).map_err(failed("BMP"))?.dimensions(),
        Ok(ImageFormat::Gif) => GifDecoder::new(Cursor::new(bytes)).map_err(failed("GIF"))?.dimensions(),
        Ok(ImageFormat::Tiff) => TiffDecoder::new(Cursor::new(bytes)).map_err(failed("TIFF"))?.dimensions(),
        _ => return Err(ImageError::UnknownFormat(sniff::what(bytes))),
    };
    check_size(size, limits)?;
    Ok(size)
}

fn image_limits(limits: &ImageLimits) -> image::Limits {
    let mut bounds = image::Limits::no_limits();
    bounds.max_alloc = Some(limits.max_pixels * 8 + (64 << 20));
    bounds
}

/// A file that lost its end may still decode, without the orientation that stands there.
fn check_riff_size(bytes: &[u8]) -> Result<(), ImageError> {
    let declared = bytes.get(4..8).and_then(|size| size.try_into().ok()).map_or(u64::MAX, |size| u64::from(u32::from_le_bytes(size)));
    if declared.saturating_add(8) > bytes.len() as u64 { Err(ImageError::Truncated) } else { Ok(()) }
}

fn check_size((width, height): (u32, u32), limits: &ImageLimits) -> Result<(), ImageError> {
    if width == 0 || height == 0 {
        return Err(ImageError::Empty);
    }
    if u64::from(width) * u64::from(height) > limits.max_pixels || width.max(height) > limits.max_side {
        return Err(ImageError::TooLarge { width, height, max_pixels: limits.max_pixels, max_side: limits.max_side });
    }
    Ok(())
}

fn read_jpeg(bytes: &[u8], limits: &ImageLimits) -> Result<RgbImage, ImageError> {
    let decoder = JpegDecoder::new(bytes)?;
    let (width, height) = decoder.dimensions();
    check_size((width, height), limits)?;
    let orientation = orientation(decoder.metadata().exif, decoder.metadata().xmp).unwrap_or(Orientation::NoTransforms);
    Ok(upright(RgbImage { width, height, data: decoder.decode()? }, orientation))
}

fn read<D: ImageDecoder>(
    decoder: image::ImageResult<D>,
    format: &'static str,
    limits: &ImageLimits,
    text_exif: Option<Vec<u8>>,
) -> Result<(RgbImage, bool), ImageError> {
    let failed = |source| ImageError::Decode { format, source };
    let mut decoder = decoder.map_err(failed)?;
    let (width, height) = decoder.dimensions();
    check_size((width, height), limits)?;
    decoder.set_limits(image_limits(limits)).map_err(failed)?;
    // Metadata that cannot be read is no reason to refuse a picture.
    let exif = decoder.exif_metadata().ok().flatten().or(text_exif);
    let xmp = decoder.xmp_metadata().ok().flatten();
    // TIFF has a tag of its own.
    let orientation = orientation(exif.as_deref(), xmp.as_deref()).or_else(|| decoder.orientation().ok()).unwrap_or(Orientation::NoTransforms);
    let color = decoder.color_type();
    if matches!(color, ColorType::Rgb32F | ColorType::Rgba32F) {
        return Err(ImageError::Color("a TIFF file of floating-point samples"));
    }
    if matches!(decoder.original_color_type(), ExtendedColorType::Cmyk8 | ExtendedColorType::Cmyk16) {
        return Err(ImageError::Color("a TIFF file in CMYK"));
    }
    let mut raw = vec![0; decoder.total_bytes() as usize];
    decoder.read_image(&mut raw).map_err(failed)?;
    let transparent = is_transparent(&raw, color);
    let data = to_rgb8(raw, color);
    Ok((upright(RgbImage { width, height, data }, orientation), transparent))
}

/// Whether any pixel is not opaque.
fn is_transparent(raw: &[u8], color: ColorType) -> bool {
    let (stride, alpha) = match color {
        ColorType::La8 => (2, 1..2),
        ColorType::Rgba8 => (4, 3..4),
        ColorType::La16 => (4, 2..4),
        ColorType::Rgba16 => (8, 6..8),
        _ => return false,
    };
    raw.chunks_exact(stride).any(|pixel| pixel[alpha.clone()].iter().any(|byte| *byte != 0xFF))
}

/// The EXIF orientation, or else XMP's.
fn orientation(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Option<Orientation> {
    // Some WebP files keep JPEG's prefix.
    let exif = exif.map(|chunk| chunk.strip_prefix(b"Exif\0\0").unwrap_or(chunk));
    exif.and_then(Orientation::from_exif_chunk).or_else(|| xmp.and_then(xmp_orientation))
}

/// `tiff:Orientation="6"` or `<tiff:Orientation>6<`.
fn xmp_orientation(xmp: &[u8]) -> Option<Orientation> {
    const TAG: &[u8] = b"tiff:Orientation";
    xmp.windows(TAG.len()).enumerate().filter(|(_, w)| *w == TAG).find_map(|(at, _)| {
        let digit = match &xmp[at + TAG.len()..] {
            [b'=', b'"', digit, ..] | [b'>', digit, ..] => *digit,
            _ => return None,
        };
        digit.is_ascii_digit().then(|| Orientation::from_exif(digit - b'0')).flatten()
    })
}

/// Drops alpha, repeats grey and keeps the high byte of 16-bit samples.
///
/// Pillow treats 16-bit grey without alpha on its own: it clips samples at 255 (`I;16` to `RGB`). That holds here for
/// pictures that only use the low byte; all others would come out white, so they keep the high byte as well.
fn to_rgb8(raw: Vec<u8>, color: ColorType) -> Vec<u8> {
    let high = usize::from(cfg!(target_endian = "little"));
    let pick = |stride: usize, at: [usize; 3]| raw.chunks_exact(stride).flat_map(|p| at.map(|i| p[i])).collect();
    match color {
        ColorType::L8 => pick(1, [0, 0, 0]),
        ColorType::La8 => pick(2, [0, 0, 0]),
        ColorType::Rgba8 => pick(4, [0, 1, 2]),
        ColorType::L16 if raw.iter().skip(high).step_by(2).all(|b| *b == 0) => pick(2, [1 - high; 3]),
        ColorType::L16 => pick(2, [high; 3]),
        ColorType::La16 => pick(4, [high; 3]),
        ColorType::Rgb16 => pick(6, [high, 2 + high, 4 + high]),
        ColorType::Rgba16 => pick(8, [high, 2 + high, 4 + high]),
        // Rgb8; the decoders give no float pictures.
        _ => raw,
    }
}

fn upright(picture: RgbImage, orientation: Orientation) -> RgbImage {
    if orientation == Orientation::NoTransforms {
        return picture;
    }
    let Some(buffer) = image::RgbImage::from_raw(picture.width, picture.height, picture.data) else {
        return RgbImage { width: 0, height: 0, data: Vec::new() };
    };
    let mut turned = DynamicImage::ImageRgb8(buffer);
    turned.apply_orientation(orientation);
    RgbImage { width: turned.width(), height: turned.height(), data: turned.into_rgb8().into_raw() }
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
