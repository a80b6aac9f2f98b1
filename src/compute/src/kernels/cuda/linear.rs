//! Linear layers with frozen weights and LoRA.

use super::driver::arguments;
use super::gemm::{Epilogue, Operand, Product};
use super::int8::Codes;
use super::skinny::{self, SkinnyGemm};
use super::{BLOCK, Cuda, Kind, Memory, any};

/// A frozen weight [outputs, inputs] in the device's precision, in half precision for a device in f32, or in 8 bits.
#[derive(Debug)]
pub struct DeviceWeight {
    pub(super) values: Frozen,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// How a weight is kept.
#[derive(Debug)]
pub(super) enum Frozen {
    /// As numbers.
    Float(Memory),
    /// As codes, which are widened before each product.
    Int8(Codes),
}

impl DeviceWeight {
    pub(in crate::kernels) fn new(outputs: usize, inputs: usize, values: Memory) -> Self {
        assert_eq!(values.len(), outputs * inputs, "should be [outputs, inputs]");
        Self { values: Frozen::Float(values), outputs, inputs }
    }

    /// In 8 bits.
    pub(super) fn int8(outputs: usize, inputs: usize, codes: Codes) -> Self {
        Self { values: Frozen::Int8(codes), outputs, inputs }
    }

    /// The values as products read them: where they are, or widened to memory that is free again when what reads them is on the stream.
    pub(super) fn values(&self, device: &Cuda) -> Memory {
        match &self.values {
            Frozen::Float(values) => values.part(0, values.len()),
            Frozen::Int8(codes) => device.widened(self.outputs, self.inputs, codes),
        }
    }
}

/// LoRA factors in the device's precision, the rank padded with zeros.
#[derive(Debug)]
pub struct DeviceLora {
    pub(in crate::kernels) rank: usize,
    pub(super) padded: usize,
    pub(super) inputs: usize,
    pub(super) outputs: usize,
    /// A [padded, inputs].
    pub(super) a: Memory,
    /// scale · B [outputs, padded].
    pub(super) b: Memory,
}

/// Ranks are padded to a multiple of this: rows of 16 bytes in half precision.
pub(super) const RANK: usize = 8;

impl Operand {
    /// A matrix as it is stored, with rows of `width` values.
    pub(super) fn stored(memory: &Memory, width: usize) -> Self {
        let (pointer, stride) = memory.rows(width);
        Self { pointer, stride, transposed: false, kind: memory.kind() }
    }

    /// The transpose of a matrix that is stored with rows of `width` values.
    pub(super) fn transposed(memory: &Memory, width: usize) -> Self {
        Self { transposed: true, ..Self::stored(memory, width) }
    }
}

impl Cuda {
    pub(in crate::kernels) fn lora(&self, rank: usize, inputs: usize, outputs: usize, a: &[f32], b: &[f32], scale: f32) -> DeviceLora {
        let padded = rank.next_multiple_of(RANK);
        assert!(a.len() == rank * inputs && b.len() == outputs * rank, "should be [rank, inputs] and [outputs, rank]");
        let pad = |values: &[f32], (from, to), len, factor: f32| {
            let (source, target) = (self.upload_values(values), self.memory_of(len, self.precision));
            let (y, x, count, from, to) = (target.pointer(), source.pointer(), len as i64, from as i32, to as i32);
            // SAFETY: the target has `count` values in rows of `to`, the source rows of `from`.
            unsafe { self.driver.launch(("pad", any(self.precision)), (len.div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![y, x, count, from, to, factor]) };
            target
        };
        // Rows that are missing at the end are columns that are missing in one long row.
        let a = pad(a, (rank * inputs, padded * inputs), padded * inputs, 1.0);
        let b = pad(b, (rank, padded), outputs * padded, scale);
        DeviceLora { rank, padded, inputs, outputs, a, b }
    }

    /// Puts a product on the stream, with a bias where one is given.
    pub(super) fn product(&self, (m, n, k): (usize, usize, usize), a: Operand, b: Operand, c: Operand, (alpha, beta): (f32, f32), bias: Option<&Memory>) {
        let epilogue = if bias.is_some() { Epilogue::Bias } else { Epilogue::None };
        let product = Product { m, n, k, a, b, c, alpha, beta, epilogue, bias: bias.map_or(0, Memory::pointer), pre: 0 };
        // SAFETY: callers check lengths; results are buffers of their own.
        unsafe { self.blas.run(&product) };
    }

    /// `y = x w + bias`, or added to y, for rows x [m, k] and a weight w [k, n]. Where the weight is in half precision and x in f32, x is
    /// multiplied in two parts of the weight's type, which together have twice its digits.
    pub(super) fn frozen_matmul(&self, (m, n, k): (usize, usize, usize), x: &Memory, w: Operand, y: &Memory, accumulate: bool, bias: Option<&Memory>) {
        if w.kind == x.kind() {
            let beta = if accumulate { 1.0 } else { 0.0 };
            return self.product((m, n, k), Operand::stored(x, k), w, Operand::stored(y, n), (1.0, beta), bias);
        }
        assert!(x.kind() == Kind::F32 && y.kind() == Kind::F32 && bias.is_none_or(|b| b.kind() == Kind::F32), "should be f32");
        let (parts, sums) = (self.memory_of(2 * m * k, w.kind), self.memory_of(2 * m * n, Kind::F32));
        let (to, from, count) = (parts.pointer(), x.pointer(), (m * k) as i64);
        // SAFETY: x has `count` values, the parts twice as many.
        unsafe { self.driver.launch(("split", any(w.kind)), ((m * k).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![to, from, count]) };
        self.product((2 * m, n, k), Operand::stored(&parts, k), w, Operand::stored(&sums, n), (1.0, 0.0), None);
        let (to, from, bias, count) = (y.pointer(), sums.pointer(), bias.map_or(0, Memory::pointer), (m * n) as i64);
        let (width, accumulates) = (n as i32, i32::from(accumulate));
        // SAFETY: y has `count` values, the sums twice as many, the bias `width`.
        unsafe { self.driver.launch(("join", ""), ((m * n).div_ceil(BLOCK), 1, 1), BLOCK, 0, arguments![to, from, bias, count, width, accumulates]) };
    }

    /// See [`crate::kernels::Device::linear`]; t has the padded rank.
    pub(in crate::kernels) fn linear(
        &self,
        rows: usize,
        x: &Memory,
        w: &DeviceWeight,
        bias: Option<&Memory>,
        lora: Option<(&DeviceLora, Option<&Memory>, f32)>,
        y: &mut Memory,
    ) -> Option<Memory> {
        let (k, n) = (w.inputs, w.outputs);
        assert!(x.len() == rows * k && y.len() == rows * n, "should be [rows, inputs] and [rows, outputs]");
        assert!(bias.is_none_or(|b| b.len() == n), "should be [outputs]");
        self.frozen_matmul((rows, n, k), x, Operand::transposed(&w.values(self), k), y, false, bias);
        lora.map(|(lora, dropped, scale)| {
            let (r, source) = (lora.padded, dropped.unwrap_or(x));
            assert!(source.len() == rows * k && (lora.inputs, lora.outputs) == (k, n), "should fit the layer");
            let t = self.memory_of(rows * r, self.precision);
            self.product((rows, r, k), Operand::stored(source, k), Operand::transposed(&lora.a, k), Operand::stored(&t, r), (scale, 0.0), None);
            self.product((rows, n, r), Operand::stored(&t, r), Operand::transposed(&lora.b, r), Operand::stored(y, n), (1.0, 1.0), None);
            t
        })
    }

    /// See [`crate::kernels::Device::linear_backward`]; dt has the padded rank.
    pub(in crate::kernels) fn linear_backward(
        &self,
        rows: usize,
        dy: &Memory,
        w: &DeviceWeight,
        lora: Option<(&DeviceLora, Option<&Memory>)>,
        dx: Option<(&mut Memory, bool)>,
    ) -> Option<Memory> {
        let (n, k) = (w.inputs, w.outputs);
        assert_eq!(dy.len(), rows * k, "should be [rows, outputs]");
        let dt = lora.map(|(lora, _)| {
            let r = lora.padded;
            let dt = self.memory_of(rows * r, self.precision);
            self.product((rows, r, k), Operand::stored(dy, k), Operand::stored(&lora.b, r), Operand::stored(&dt, r), (1.0, 0.0), None);
            dt
        });
        if let Some((dx, accumulate)) = dx {
            assert_eq!(dx.len(), rows * n, "should be [rows, inputs]");
            self.frozen_matmul((rows, n, k), dy, Operand::stored(&w.values(self), n), dx, accumulate, None);
            if let (Some((lora, mask)), Some(dt)) = (lora, &dt) {
                let r = lora.padded;
                if let Some(mask) = mask {
                    let mut through = self.memory_of(rows * n, self.precision);
                    self.product((rows, n, r), Operand::stored(dt, r), Operand::stored(&lora.a, n), Operand::stored(&through, n), (1.0, 0.0), None);
                    self.multiply(&mut through, mask);
                    self.add(dx, &through);
                } else {
                    self.product((rows, n, r), Operand::stored(dt, r), Operand::stored(&lora.a, n), Operand::stored(dx, n), (1.0, 1.0), None);
                }
            }
        }
        dt
    }

    /// See [`crate::kernels::Device::lora_gradient`]; the gradients are f32.
    #[expect(clippy::too_many_arguments, reason = "four operands, two results and their sizes")]
    pub(in crate::kernels) fn lora_gradient(
        &self,
        rows: usize,
        x: &Memory,
        dy: &Memory,
        t: &Memory,
        dt: &Memory,
        scale: f32,
        da: &mut Memory,
        db: &mut Memory,
    ) {
        let (inputs, outputs, padded) = (x.len() / rows, dy.len() / rows, t.len() / rows);
        let rank = da.len() / inputs;
        assert!(da.kind() == Kind::F32 && db.kind() == Kind::F32 && db.len() == outputs * rank, "should be f32");
        let a = SkinnyGemm { x, n: inputs, t: dt, padded, ranks: rank, to: da, strides: (inputs, 1), scale: 1.0 };
        let b = SkinnyGemm { x: dy, n: outputs, t, padded, ranks: rank, to: db, strides: (1, rank), scale };
        self.lora_products(rows, &[a, b]);
    }

    /// `to += scale · tᵀ x` for each, by whatever is fastest for this rank.
    pub(super) fn lora_products(&self, rows: usize, products: &[SkinnyGemm<'_>]) {
        if products.iter().all(|p| p.ranks <= skinny::MAX_RANK) {
            return self.skinny_gemms(rows, products);
        }
        for p in products {
            let (x, t) = (Operand::stored(p.x, p.n), Operand::stored(p.t, p.padded));
            if p.strides.1 == 1 {
                let t = Operand { transposed: true, ..t };
                self.product((p.ranks, p.n, rows), t, x, Operand::stored(p.to, p.n), (p.scale, 1.0), None);
            } else {
                let x = Operand { transposed: true, ..x };
                self.product((p.n, p.ranks, rows), x, t, Operand::stored(p.to, p.ranks), (p.scale, 1.0), None);
            }
        }
    }
}
