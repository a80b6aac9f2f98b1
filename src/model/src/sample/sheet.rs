//! Contact sheets: rows of pictures with a label above each row and a caption below each picture.

use image::{Rgb, RgbImage, imageops};

use super::font;

/// A row of a contact sheet.
#[derive(Debug, Clone, Default)]
pub struct SheetRow {
    /// Drawn above the row, if not empty.
    pub label: String,
    /// Pictures, each with the caption drawn below it, if not empty.
    pub cells: Vec<(RgbImage, String)>,
    /// Empty pixels above the row, besides the margin.
    pub space: u32,
}

/// Most pictures side by side that a page shows at a readable size.
pub const COLUMNS: usize = 8;

/// Empty pixels above a group of rows.
const GROUP_SPACE: u32 = 12;

/// Rows whose cells belong together column by column, in groups of at most `columns` columns: the first cells of every row,
/// then the next ones of every row.
pub fn in_groups(rows: &[SheetRow], columns: usize) -> Vec<SheetRow> {
    let (columns, longest) = (columns.max(1), rows.iter().map(|r| r.cells.len()).max().unwrap_or(0));
    let mut grouped = Vec::new();
    for first in (0..longest).step_by(columns) {
        for (i, row) in rows.iter().enumerate() {
            let cells = row.cells.iter().skip(first).take(columns).cloned().collect();
            let space = if first > 0 && i == 0 { GROUP_SPACE } else { 0 };
            grouped.push(SheetRow { label: row.label.clone(), cells, space: row.space + space });
        }
    }
    grouped
}

/// A contact sheet.
#[derive(Debug, Clone, Default)]
pub struct Sheet {
    /// Rows from the top.
    pub rows: Vec<SheetRow>,
    /// Small pictures are enlarged (by whole factors, without smoothing) to at least this width. 0: never.
    pub least_width: u32,
}

const MARGIN: u32 = 6;
const INK: Rgb<u8> = Rgb([32, 32, 32]);
const PAPER: Rgb<u8> = Rgb([255, 255, 255]);

impl Sheet {
    /// Draws the sheet.
    pub fn draw(&self) -> RgbImage {
        let factor = |picture: &RgbImage| self.least_width.div_ceil(picture.width().max(1)).max(1);
        let cell_width = self.cells().map(|(p, _)| p.width() * factor(p)).max().unwrap_or(1);
        let columns = self.rows.iter().map(|r| r.cells.len()).max().unwrap_or(0) as u32;
        let label_width = self.rows.iter().map(|r| font::width(&r.label)).max().unwrap_or(0);
        let width = (MARGIN + columns * (cell_width + MARGIN)).max(label_width + 2 * MARGIN);
        let letters = (cell_width / font::ADVANCE).max(1) as usize;
        let heights: Vec<(u32, u32, u32)> = self
            .rows
            .iter()
            .map(|row| {
                let label = row.space + if row.label.is_empty() { 0 } else { font::LINE };
                let pictures = row.cells.iter().map(|(p, _)| p.height() * factor(p)).max().unwrap_or(0);
                let lines = row.cells.iter().map(|(_, caption)| wrap(caption, letters).len()).max().unwrap_or(0);
                (label, pictures, lines as u32 * font::LINE)
            })
            .collect();
        let height = MARGIN + heights.iter().map(|(a, b, c)| a + b + c + MARGIN).sum::<u32>();
        let mut sheet = RgbImage::from_pixel(width, height, PAPER);
        let mut y = MARGIN;
        for (row, (label, pictures, captions)) in self.rows.iter().zip(heights) {
            font::draw(&mut sheet, MARGIN, y + row.space, &row.label, INK);
            y += label;
            for (column, (picture, caption)) in row.cells.iter().enumerate() {
                let x = MARGIN + column as u32 * (cell_width + MARGIN);
                let scale = factor(picture);
                let large = imageops::resize(picture, picture.width() * scale, picture.height() * scale, imageops::FilterType::Nearest);
                imageops::replace(&mut sheet, &large, i64::from(x), i64::from(y));
                for (line, text) in wrap(caption, letters).iter().enumerate() {
                    font::draw(&mut sheet, x, y + pictures + 2 + line as u32 * font::LINE, text, INK);
                }
            }
            y += pictures + captions + MARGIN;
        }
        sheet
    }

    fn cells(&self) -> impl Iterator<Item = &(RgbImage, String)> {
        self.rows.iter().flat_map(|r| &r.cells)
    }
}

/// Lines of at most `letters` letters, broken at spaces where possible; at most four, the last one cut with dots.
fn wrap(text: &str, letters: usize) -> Vec<String> {
    const LINES: usize = 4;
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        let pieces: Vec<char> = word.chars().collect();
        for (i, piece) in pieces.chunks(letters).enumerate() {
            let piece: String = piece.iter().collect();
            match lines.last_mut() {
                Some(last) if i == 0 && last.chars().count() + 1 + piece.chars().count() <= letters => {
                    last.push(' ');
                    last.push_str(&piece);
                }
                _ => lines.push(piece),
            }
        }
    }
    if lines.len() > LINES {
        lines.truncate(LINES);
        let keep: String = lines[LINES - 1].chars().take(letters.saturating_sub(3)).collect();
        lines[LINES - 1] = keep + "...";
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_labels_and_captions_are_drawn() {
        let red = RgbImage::from_pixel(10, 8, Rgb([255, 0, 0]));
        let blue = RgbImage::from_pixel(10, 8, Rgb([0, 0, 255]));
        let plain = SheetRow { label: String::new(), cells: vec![(red.clone(), String::new()), (blue.clone(), String::new())], space: 0 };
        let sheet = Sheet { rows: vec![plain.clone()], least_width: 0 }.draw();
        assert_eq!((sheet.width(), sheet.height()), (6 + 16 + 16, 6 + 8 + 6));
        assert_eq!((sheet.get_pixel(6, 6).0, sheet.get_pixel(22, 6).0, sheet.get_pixel(0, 0).0), ([255, 0, 0], [0, 0, 255], [255, 255, 255]));

        let row = SheetRow { label: "LoRA".into(), cells: vec![(red, "a long word".into()), (blue, String::new())], space: 0 };
        let large = Sheet { rows: vec![plain, row], least_width: 40 }.draw();
        assert_eq!(large.width(), 6 + 46 * 2);
        // Six letters fit 40 pixels: two lines.
        assert_eq!(large.height(), 6 + (32 + 6) + (font::LINE + 32 + 2 * font::LINE + 6));
        assert!(large.pixels().any(|p| *p == INK));
    }

    /// Two rows of three pictures in groups of two columns: a, b over d, e; then, after a space, c over f.
    #[test]
    fn a_picture_stays_above_its_counterpart_when_rows_are_grouped() {
        let cell = |level| (RgbImage::from_pixel(4, 4, Rgb([level; 3])), String::new());
        let row = |levels: [u8; 3]| SheetRow { label: String::new(), cells: levels.map(cell).to_vec(), space: 0 };
        let rows = in_groups(&[row([1, 2, 3]), row([4, 5, 6])], 2);
        let levels: Vec<Vec<u8>> = rows.iter().map(|r| r.cells.iter().map(|(p, _)| p.get_pixel(0, 0).0[0]).collect()).collect();
        assert_eq!(levels, [vec![1, 2], vec![4, 5], vec![3], vec![6]]);
        assert_eq!(rows.iter().map(|r| r.space).collect::<Vec<_>>(), [0, 0, GROUP_SPACE, 0]);
        let sheet = Sheet { rows, least_width: 0 }.draw();
        assert_eq!((sheet.width(), sheet.height()), (6 + 2 * 10, 6 + 4 * 10 + GROUP_SPACE));
        assert_eq!((sheet.get_pixel(6, 26 + GROUP_SPACE).0, sheet.get_pixel(6, 26).0), ([3; 3], PAPER.0));
        assert!(in_groups(&[], 2).is_empty());
    }

    #[test]
    fn captions_wrap() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("extraordinarily", 6), ["extrao", "rdinar", "ily"]);
        assert_eq!(wrap("a b c d e f", 1), ["a", "b", "c", "..."]);
        assert!(wrap("", 5).is_empty());
        assert_eq!(Sheet::default().draw().height(), MARGIN);
    }
}
