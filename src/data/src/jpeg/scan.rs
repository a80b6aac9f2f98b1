//! Scans: entropy-coded blocks to samples, sequential and progressive (ITU-T T.81, annexes F and G).

use super::JpegError;
use super::header::{Frame, ScanComponent, ScanHeader, Tables, ZIGZAG};
use super::huffman::{Bits, HuffmanTable};
use super::idct::idct;

/// The real samples of a component.
pub(super) struct Samples {
    pub(super) width: usize,
    pub(super) height: usize,
    stride: usize,
    data: Vec<u8>,
}

impl Samples {
    pub(super) fn row(&self, y: usize) -> &[u8] {
        &self.data[y * self.stride..y * self.stride + self.width]
    }
}

/// A component while it is decoded.
struct Plane {
    samples: Samples,
    /// Blocks per row and column, whole minimum coded units.
    blocks: (usize, usize),
    /// All coefficients, for progressive files only.
    coefficients: Vec<[i16; 64]>,
    /// Whether a scan brought data.
    seen: bool,
}

/// All components while they are decoded.
pub(super) struct Planes {
    planes: Vec<Plane>,
    /// Coded blocks left in the band's end-of-band run.
    end_of_band: u32,
}

impl Planes {
    pub(super) fn new(frame: &Frame) -> Result<Self, JpegError> {
        if frame.width == 0 || frame.height == 0 {
            return Err(JpegError::Unsupported("a height that is not in the header"));
        }
        let (mcus_x, mcus_y) = frame.mcus();
        let plane = |component| {
            let component: &super::header::Component = component;
            let blocks = (mcus_x * component.h, mcus_y * component.v);
            let (width, height) = frame.size_of(component);
            let coefficients = if frame.progressive { vec![[0; 64]; blocks.0 * blocks.1] } else { Vec::new() };
            let samples = Samples { width, height, stride: blocks.0 * 8, data: vec![0; blocks.0 * blocks.1 * 64] };
            Plane { samples, blocks, coefficients, seen: false }
        };
        Ok(Self { planes: frame.components.iter().map(plane).collect(), end_of_band: 0 })
    }

    /// Decodes one scan from the start of `bytes`; returns the number of bytes that it took.
    pub(super) fn decode_scan(&mut self, frame: &Frame, header: &ScanHeader, tables: &Tables, bytes: &[u8]) -> Result<usize, JpegError> {
        let components = resolve(frame, header)?;
        self.check(frame, header, &components)?;
        let mut bits = Bits::new(bytes);
        let mut predictions = [0_i32; 4];
        self.end_of_band = 0;
        // A scan of one component covers its real blocks; several are interleaved in whole minimum coded units.
        let interleaved = components.len() > 1;
        let (columns, rows) = if interleaved {
            frame.mcus()
        } else {
            let samples = &self.planes[components[0].index].samples;
            (samples.width.div_ceil(8), samples.height.div_ceil(8))
        };
        for unit in 0..columns * rows {
            if tables.restart_interval > 0 && unit > 0 && unit % tables.restart_interval == 0 {
                bits.restart()?;
                predictions = [0; 4];
                self.end_of_band = 0;
            }
            let (column, row) = (unit % columns, unit / columns);
            for scan in &components {
                let component = &frame.components[scan.index];
                let (h, v) = if interleaved { (component.h, component.v) } else { (1, 1) };
                for block in 0..h * v {
                    let at = (column * h + block % h, row * v + block / h);
                    let prediction = &mut predictions[scan.index];
                    if frame.progressive {
                        self.progressive_block(scan, header, tables, &mut bits, prediction, at)?;
                    } else {
                        self.sequential_block(scan, component.table, tables, &mut bits, prediction, at)?;
                    }
                }
            }
        }
        for scan in &components {
            self.planes[scan.index].seen = true;
        }
        Ok(bits.position())
    }

    fn check(&self, frame: &Frame, header: &ScanHeader, components: &[ScanComponent]) -> Result<(), JpegError> {
        let valid = if frame.progressive {
            let dc = header.start == 0 && header.end == 0;
            let ac = header.start > 0 && components.len() == 1;
            (dc || ac) && (header.high == 0 || header.low + 1 == header.high)
        } else {
            components.iter().all(|c| !self.planes[c.index].seen)
        };
        if valid { Ok(()) } else { Err(JpegError::Damaged("scan parameters")) }
    }

    fn sequential_block(
        &mut self,
        scan: &ScanComponent,
        quantization: usize,
        tables: &Tables,
        bits: &mut Bits<'_>,
        prediction: &mut i32,
        at: (usize, usize),
    ) -> Result<(), JpegError> {
        let (dc, ac) = (table(&tables.dc, scan.dc)?, table(&tables.ac, scan.ac)?);
        let mut block = [0_i16; 64];
        *prediction = prediction.wrapping_add(dc_difference(bits, dc)?);
        block[0] = *prediction as i16;
        let mut k = 1;
        while k < 64 {
            let symbol = bits.symbol(ac)?;
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            if size == 0 {
                if run != 15 {
                    break;
                }
                k += 16;
                continue;
            }
            k += run;
            let place = ZIGZAG.get(k).ok_or(JpegError::Damaged("a block has too many coefficients"))?;
            block[usize::from(*place)] = bits.extend(size)? as i16;
            k += 1;
        }
        let quantization = tables.quantization[quantization].as_ref().ok_or(JpegError::Damaged("a quantization table is missing"))?;
        self.planes[scan.index].write(&block, quantization, at);
        Ok(())
    }

    fn progressive_block(
        &mut self,
        scan: &ScanComponent,
        header: &ScanHeader,
        tables: &Tables,
        bits: &mut Bits<'_>,
        prediction: &mut i32,
        at: (usize, usize),
    ) -> Result<(), JpegError> {
        let plane = &mut self.planes[scan.index];
        let block = &mut plane.coefficients[at.1 * plane.blocks.0 + at.0];
        match (header.start, header.high) {
            (0, 0) => {
                *prediction = prediction.wrapping_add(dc_difference(bits, table(&tables.dc, scan.dc)?)?);
                block[0] = (*prediction << header.low) as i16;
                Ok(())
            }
            (0, _) => {
                block[0] |= (bits.bits(1)? as i16) << header.low;
                Ok(())
            }
            (_, 0) => ac_first(block, header, table(&tables.ac, scan.ac)?, bits, &mut self.end_of_band),
            _ => ac_refine(block, header, table(&tables.ac, scan.ac)?, bits, &mut self.end_of_band),
        }
    }

    /// The samples of all components.
    pub(super) fn finish(mut self, frame: &Frame, tables: &Tables) -> Result<Vec<Samples>, JpegError> {
        for (plane, component) in self.planes.iter_mut().zip(&frame.components) {
            if !plane.seen {
                return Err(JpegError::Damaged("a component has no data"));
            }
            let quantization = tables.quantization[component.table].as_ref().ok_or(JpegError::Damaged("a quantization table is missing"))?;
            for (i, block) in std::mem::take(&mut plane.coefficients).iter().enumerate() {
                plane.write(block, quantization, (i % plane.blocks.0, i / plane.blocks.0));
            }
        }
        Ok(self.planes.into_iter().map(|plane| plane.samples).collect())
    }
}

impl Plane {
    fn write(&mut self, block: &[i16; 64], quantization: &[u16; 64], (x, y): (usize, usize)) {
        let stride = self.samples.stride;
        idct(block, quantization, &mut self.samples.data[y * 8 * stride + x * 8..], stride);
    }
}

fn resolve(frame: &Frame, header: &ScanHeader) -> Result<Vec<ScanComponent>, JpegError> {
    let mut found: Vec<ScanComponent> = Vec::new();
    for selector in &header.components {
        let index = frame.components.iter().position(|c| usize::from(c.id) == selector.index).ok_or(JpegError::Damaged("scan of an unknown component"))?;
        if found.iter().any(|c| c.index == index) {
            return Err(JpegError::Damaged("a component twice in a scan"));
        }
        found.push(ScanComponent { index, ..*selector });
    }
    Ok(found)
}

fn table(tables: &[Option<HuffmanTable>; 4], index: usize) -> Result<&HuffmanTable, JpegError> {
    tables[index].as_ref().ok_or(JpegError::Damaged("a Huffman table is missing"))
}

fn dc_difference(bits: &mut Bits<'_>, table: &HuffmanTable) -> Result<i32, JpegError> {
    let size = bits.symbol(table)?;
    if size > 15 {
        return Err(JpegError::Damaged("DC difference"));
    }
    bits.extend(u32::from(size))
}

/// First pass over a band (G.1.2.2).
fn ac_first(block: &mut [i16; 64], header: &ScanHeader, table: &HuffmanTable, bits: &mut Bits<'_>, end_of_band: &mut u32) -> Result<(), JpegError> {
    if *end_of_band > 0 {
        *end_of_band -= 1;
        return Ok(());
    }
    let mut k = header.start;
    while k <= header.end {
        let symbol = bits.symbol(table)?;
        let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
        if size == 0 {
            if run < 15 {
                *end_of_band = (1 << run) - 1 + bits.bits(run as u32)?;
                return Ok(());
            }
            k += 16;
            continue;
        }
        k += run;
        let place = ZIGZAG.get(k).ok_or(JpegError::Damaged("a block has too many coefficients"))?;
        block[usize::from(*place)] = (bits.extend(size)? << header.low) as i16;
        k += 1;
    }
    Ok(())
}

/// Later passes over a band (G.1.2.3): one more bit for known coefficients, and new ones of magnitude 1.
fn ac_refine(block: &mut [i16; 64], header: &ScanHeader, table: &HuffmanTable, bits: &mut Bits<'_>, end_of_band: &mut u32) -> Result<(), JpegError> {
    let bit = 1_i16 << header.low;
    let refine = |value: &mut i16, bits: &mut Bits<'_>| -> Result<(), JpegError> {
        if bits.bits(1)? == 1 && *value & bit == 0 {
            *value = value.wrapping_add(if *value > 0 { bit } else { -bit });
        }
        Ok(())
    };
    let mut k = header.start;
    if *end_of_band == 0 {
        while k <= header.end {
            let symbol = bits.symbol(table)?;
            let (mut run, size) = (usize::from(symbol >> 4), symbol & 15);
            let new = match size {
                0 if run < 15 => {
                    *end_of_band = (1 << run) + bits.bits(run as u32)?;
                    break;
                }
                0 => 0,
                1 if bits.bits(1)? == 1 => bit,
                1 => -bit,
                _ => return Err(JpegError::Damaged("a refinement of more than one bit")),
            };
            // Skip `run` coefficients that are still zero, refining those that are not.
            while k <= header.end {
                let value = &mut block[usize::from(ZIGZAG[k])];
                if *value != 0 {
                    refine(value, bits)?;
                } else if run == 0 {
                    *value = new;
                    k += 1;
                    break;
                } else {
                    run -= 1;
                }
                k += 1;
            }
        }
    }
    if *end_of_band > 0 {
        for place in ZIGZAG.get(k..=header.end).unwrap_or_default() {
            let value = &mut block[usize::from(*place)];
            if *value != 0 {
                refine(value, bits)?;
            }
        }
        *end_of_band -= 1;
    }
    Ok(())
}
