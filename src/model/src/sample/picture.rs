//! Tensors to pictures and files.

use std::path::Path;

use image::RgbImage;

use super::SampleError;
use finetune_common::tensor::HostTensor;

/// Pictures of decoded values [B, 3, H, W] in about [-1, 1]: x/2 + 0.5, clamped to [0, 1], in 255ths.
///
/// # Errors
/// If the shape does not fit, or a value is not finite.
pub fn to_pictures(decoded: &HostTensor) -> Result<Vec<RgbImage>, SampleError> {
    let &[_, 3, height, width] = decoded.shape() else {
        return Err(SampleError::Setting {
            setting: "the shape of decoded pictures",
            value: format!("{:?}", decoded.shape()),
            expected: "[B, 3, H, W]".into(),
        });
    };
    if !decoded.is_finite() {
        return Err(SampleError::NotFinite { what: "decoded pictures", network: "VAE" });
    }
    let unit = to_unit(decoded.clone());
    let (pixels, mut pictures) = (height * width, Vec::new());
    for planes in unit.values().chunks_exact((3 * pixels).max(1)) {
        let bytes = (0..pixels).flat_map(|i| [0, 1, 2].map(|channel| (planes[channel * pixels + i] * 255.0).round_ties_even() as u8)).collect();
        pictures.extend(RgbImage::from_raw(width as u32, height as u32, bytes));
    }
    Ok(pictures)
}

/// Decoded values to [0, 1]: x/2 + 0.5, clamped.
pub fn to_unit(decoded: HostTensor) -> HostTensor {
    decoded.map(|x| (x / 2.0 + 0.5).clamp(0.0, 1.0))
}

/// Writes a picture as PNG, whatever the file's name; through a temporary file beside it, so that no half of a picture
/// is ever there.
///
/// # Errors
/// If the file cannot be written.
pub fn save_png(picture: &RgbImage, path: &Path) -> Result<(), SampleError> {
    let failed = |source: image::ImageError| SampleError::Write { path: path.to_owned(), source };
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|e| failed(e.into()))?;
    let mut file = tempfile::Builder::new().prefix(".picture").suffix(".png").tempfile_in(folder).map_err(|e| failed(e.into()))?;
    picture.write_to(&mut std::io::BufWriter::new(SeekableFile(file.as_file_mut())), image::ImageFormat::Png).map_err(failed)?;
    // A temporary file is private; a picture has a new file's usual mode.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(|e| failed(e.into()))?;
    }
    file.persist(path).map_err(|e| failed(e.error.into()))?;
    Ok(())
}

/// Lends a file to a buffered writer.
struct SeekableFile<'a>(&'a mut std::fs::File);

impl std::io::Write for SeekableFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

impl std::io::Seek for SeekableFile<'_> {
    fn seek(&mut self, to: std::io::SeekFrom) -> std::io::Result<u64> {
        self.0.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_become_pixels_and_files() {
        let values = vec![-1.0_f32, 1.0, 0.0, 5.0, -5.0, 0.5];
        let decoded = HostTensor::new(values, [1, 3, 1, 2]).unwrap();
        let pictures = to_pictures(&decoded).unwrap();
        assert_eq!(pictures.len(), 1);
        // Channel planes [-1, 1], [0, 5], [-5, 0.5] of two pixels.
        assert_eq!(pictures[0].get_pixel(0, 0).0, [0, 128, 0]);
        assert_eq!(pictures[0].get_pixel(1, 0).0, [255, 255, 191]);
        let damaged = HostTensor::new(vec![0.0, f32::NAN, 0.0], [1, 3, 1, 1]).unwrap();
        assert!(matches!(to_pictures(&damaged), Err(SampleError::NotFinite { .. })));
        assert!(to_pictures(&HostTensor::zeros([1, 4, 1, 1])).is_err());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/folder/a.png");
        save_png(&pictures[0], &path).unwrap();
        assert_eq!(image::open(&path).unwrap().to_rgb8(), pictures[0]);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file stays");
    }
}
