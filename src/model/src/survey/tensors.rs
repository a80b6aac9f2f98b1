//! The tensors that each network reads, by its configuration, and how those of a file differ from them.

use super::header::Tensors;
use crate::mmdit::MmditConfig;
use crate::text::{ClipConfig, T5Config};
use crate::vae::VaeConfig;

/// A tensor that is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Its names, today's first.
    pub(crate) names: Vec<String>,
    /// Its shape; a matrix may also be stored as a convolution of one pixel where `pointwise`.
    pub(crate) shape: Vec<usize>,
    pointwise: bool,
}

/// Collects what a network reads.
#[derive(Default)]
struct List(Vec<Wanted>);

impl List {
    fn tensor(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push(Wanted { names: vec![name.into()], shape: shape.to_vec(), pointwise: false });
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) {
        self.tensor(format!("{name}.weight"), &[outputs, inputs]);
        self.tensor(format!("{name}.bias"), &[outputs]);
    }

    fn norm(&mut self, name: &str, size: usize) {
        self.tensor(format!("{name}.weight"), &[size]);
        self.tensor(format!("{name}.bias"), &[size]);
    }

    fn conv(&mut self, name: &str, outputs: usize, inputs: usize, kernel: usize) {
        self.tensor(format!("{name}.weight"), &[outputs, inputs, kernel, kernel]);
        self.tensor(format!("{name}.bias"), &[outputs]);
    }
}

/// The transformer's.
pub(crate) fn transformer(config: &MmditConfig) -> Vec<Wanted> {
    let mut list = List::default();
    let (d, p, side) = (config.width(), config.patch_size, config.pos_embed_max_size);
    list.conv("pos_embed.proj", d, config.in_channels, p);
    list.tensor("pos_embed.pos_embed", &[1, side * side, d]);
    for site in config.linear_sites() {
        list.linear(&site.name, site.out_features, site.in_features);
    }
    if config.qk_norm.is_some() {
        for layer in 0..config.num_layers {
            let mut norm = |name: &str| list.tensor(format!("transformer_blocks.{layer}.{name}.weight"), &[config.attention_head_dim]);
            ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"].into_iter().for_each(&mut norm);
            if config.is_dual(layer) {
                ["attn2.norm_q", "attn2.norm_k"].into_iter().for_each(&mut norm);
            }
        }
    }
    list.0
}

/// A CLIP text encoder's.
pub(crate) fn clip(config: &ClipConfig) -> Vec<Wanted> {
    let mut list = List::default();
    let (d, ff) = (config.hidden_size, config.intermediate_size);
    list.tensor("text_model.embeddings.token_embedding.weight", &[config.vocab_size, d]);
    list.tensor("text_model.embeddings.position_embedding.weight", &[config.max_position_embeddings, d]);
    for layer in 0..config.num_hidden_layers {
        let part = |name: &str| format!("text_model.encoder.layers.{layer}.{name}");
        for name in ["layer_norm1", "layer_norm2"] {
            list.norm(&part(name), d);
        }
        for name in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            list.linear(&part(&format!("self_attn.{name}")), d, d);
        }
        list.linear(&part("mlp.fc1"), ff, d);
        list.linear(&part("mlp.fc2"), d, ff);
    }
    list.norm("text_model.final_layer_norm", d);
    list.tensor("text_projection.weight", &[config.projection_dim, d]);
    list.0
}

/// T5's encoder's.
pub(crate) fn t5(config: &T5Config) -> Vec<Wanted> {
    let mut list = List::default();
    let (d, ff, inner) = (config.d_model, config.d_ff, config.num_heads * config.d_kv);
    let names = ["shared.weight", "encoder.embed_tokens.weight"].map(str::to_owned).to_vec();
    list.0.push(Wanted { names, shape: vec![config.vocab_size, d], pointwise: false });
    let table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight";
    list.tensor(table, &[config.relative_attention_num_buckets, config.num_heads]);
    for layer in 0..config.num_layers {
        let mut tensor = |name: &str, shape: &[usize]| list.tensor(format!("encoder.block.{layer}.layer.{name}.weight"), shape);
        tensor("0.layer_norm", &[d]);
        for name in ["q", "k", "v"] {
            tensor(&format!("0.SelfAttention.{name}"), &[inner, d]);
        }
        tensor("0.SelfAttention.o", &[d, inner]);
        tensor("1.layer_norm", &[d]);
        tensor("1.DenseReluDense.wi_0", &[ff, d]);
        tensor("1.DenseReluDense.wi_1", &[ff, d]);
        tensor("1.DenseReluDense.wo", &[d, ff]);
    }
    list.tensor("encoder.final_layer_norm.weight", &[d]);
    list.0
}

/// The autoencoder's; the decoder's only where pictures are drawn.
pub(crate) fn vae(config: &VaeConfig, decoder: bool) -> Vec<Wanted> {
    let mut list = List::default();
    let channels = &config.block_out_channels;
    let (Some(&first), Some(&last)) = (channels.first(), channels.last()) else { return list.0 };
    list.conv("encoder.conv_in", first, config.in_channels, 3);
    for (i, &output) in channels.iter().enumerate() {
        let name = format!("encoder.down_blocks.{i}");
        resnets(&mut list, &name, channels[i.saturating_sub(1)], output, config.layers_per_block);
        if i + 1 < channels.len() {
            list.conv(&format!("{name}.downsamplers.0.conv"), output, output, 3);
        }
    }
    ends(&mut list, "encoder", config, last, last, 2 * config.latent_channels);
    if config.use_quant_conv {
        list.conv("quant_conv", 2 * config.latent_channels, 2 * config.latent_channels, 1);
    }
    if decoder {
        if config.use_post_quant_conv {
            list.conv("post_quant_conv", config.latent_channels, config.latent_channels, 1);
        }
        list.conv("decoder.conv_in", last, config.latent_channels, 3);
        let mut input = last;
        for (i, &output) in channels.iter().rev().enumerate() {
            let name = format!("decoder.up_blocks.{i}");
            resnets(&mut list, &name, input, output, config.layers_per_block + 1);
            if i + 1 < channels.len() {
                list.conv(&format!("{name}.upsamplers.0.conv"), output, output, 3);
            }
            input = output;
        }
        ends(&mut list, "decoder", config, last, first, config.out_channels);
    }
    list.0
}

fn resnets(list: &mut List, name: &str, input: usize, output: usize, count: usize) {
    for i in 0..count {
        let (name, input) = (format!("{name}.resnets.{i}"), if i == 0 { input } else { output });
        list.norm(&format!("{name}.norm1"), input);
        list.conv(&format!("{name}.conv1"), output, input, 3);
        list.norm(&format!("{name}.norm2"), output);
        list.conv(&format!("{name}.conv2"), output, output, 3);
        if input != output {
            list.conv(&format!("{name}.conv_shortcut"), output, input, 1);
        }
    }
}

/// The lowest level and the last layers of an encoder or decoder.
fn ends(list: &mut List, name: &str, config: &VaeConfig, middle: usize, last: usize, outputs: usize) {
    resnets(list, &format!("{name}.mid_block"), middle, middle, 2);
    if config.mid_block_add_attention {
        let part = |part: &str| format!("{name}.mid_block.attentions.0.{part}");
        list.norm(&part("group_norm"), middle);
        for (today, old) in [("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")] {
            let names = |end: &str| [today, old].map(|name| format!("{}.{end}", part(name))).to_vec();
            list.0.push(Wanted { names: names("weight"), shape: vec![middle, middle], pointwise: true });
            list.0.push(Wanted { names: names("bias"), shape: vec![middle], pointwise: false });
        }
    }
    list.norm(&format!("{name}.conv_norm_out"), last);
    list.conv(&format!("{name}.conv_out"), outputs, last, 3);
}

/// What is wrong with the tensors of a part, one line for each kind of fault.
pub(super) fn compare(tensors: &Tensors, wanted: &[Wanted]) -> Vec<String> {
    if let Some(quantised) = quantised(tensors) {
        return vec![quantised];
    }
    let (mut missing, mut shapes, mut types, mut sizes) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for Wanted { names, shape, pointwise } in wanted {
        let Some((name, found)) = names.iter().find_map(|name| Some((name, tensors.get(name)?))) else {
            missing.push(names[0].clone());
            continue;
        };
        let same = found.shape == *shape || (*pointwise && found.shape.len() == 4 && found.shape[..2] == shape[..] && found.shape[2..] == [1, 1]);
        if !same {
            shapes.push(format!("{name} has shape {:?}, not {shape:?}", found.shape));
        }
        let size: u64 = match found.dtype.as_str() {
            "F8_E4M3" => 1,
            "F16" | "BF16" => 2,
            "F32" => 4,
            other => {
                types.push(format!("{name} is {other}"));
                continue;
            }
        };
        let bytes = found.shape.iter().try_fold(size, |bytes, side| bytes.checked_mul(*side as u64));
        if bytes != Some(found.bytes()) {
            sizes.push(format!("{name} of shape {:?} and type {} has {} bytes", found.shape, found.dtype, found.bytes()));
        }
    }
    let mut problems = Vec::new();
    if !missing.is_empty() {
        problems.push(format!("lacks {}: the weights do not belong to this config.json", some(&missing, "tensor", "tensors")));
    }
    if !shapes.is_empty() {
        problems.push(format!("{}: the weights do not belong to this config.json", folded(&shapes)));
    }
    if !types.is_empty() {
        problems.push(format!("{}: only F16, BF16, F32 and F8_E4M3 weights are read; use the original files, not quantised ones", folded(&types)));
    }
    if !sizes.is_empty() {
        problems.push(format!("{}: the file is damaged, download it again", folded(&sizes)));
    }
    problems
}

/// A form of bitsandbytes, by the tensors that it adds; 8-bit floats whose scales have no place in this layout.
fn quantised(tensors: &Tensors) -> Option<String> {
    if let Some(scale) = tensors.keys().find(|name| name.ends_with(".scale_weight") || name.ends_with(".weight_scale")) {
        return Some(format!("has scaled 8-bit weights ({scale:?}), which are read from single files only: use the original weights (F16, BF16 or F32)"));
    }
    let bits = if tensors.keys().any(|name| name.contains(".quant_state.bitsandbytes") || name.ends_with(".absmax")) {
        4
    } else if tensors.keys().any(|name| name.ends_with(".SCB")) {
        8
    } else {
        return None;
    };
    Some(format!("is quantised to {bits} bits by bitsandbytes, which is not read: use the original weights (F16, BF16 or F32)"))
}

/// `1 tensor ("a")`, `7 tensors ("a", "b", ...)`.
fn some(names: &[String], one: &str, many: &str) -> String {
    let shown: Vec<String> = names.iter().take(2).map(|name| format!("{name:?}")).collect();
    let more = if names.len() > shown.len() { ", ..." } else { "" };
    format!("{} {} ({}{more})", names.len(), if names.len() == 1 { one } else { many }, shown.join(", "))
}

/// The first of several and how many there are besides.
fn folded(lines: &[String]) -> String {
    match lines {
        [] => String::new(),
        [only] => only.clone(),
        [first, rest @ ..] => format!("{first} (and {} like it)", rest.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(list: &[Wanted]) -> Tensors {
        let info = |w: &Wanted| {
            (
                w.names[0].clone(),
                serde_json::from_value(serde_json::json!({"dtype": "F16", "shape": w.shape, "data_offsets": [0, 2 * w.shape.iter().product::<usize>()]}))
                    .unwrap(),
            )
        };
        list.iter().map(info).collect()
    }

    fn t5_config() -> T5Config {
        serde_json::from_value(serde_json::json!({"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 6, "num_layers": 2, "num_heads": 2})).unwrap()
    }

    /// The lists are the files of a model that trains, tensor by tensor, with nothing left over.
    #[test]
    fn the_fixture_has_what_is_wanted_and_nothing_else() {
        use crate::layout::{ModelDir, Part};
        use crate::survey::{Header, header};
        let model = ModelDir::open(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/micro-sd3"))).unwrap();
        let files = |part: Part| {
            let name = if matches!(part, Part::Transformer | Part::Vae) { "diffusion_pytorch_model" } else { "model" };
            let bytes = std::fs::read(model.path(part).join(format!("{name}.safetensors"))).unwrap();
            let Ok(Header::Whole(tensors)) = header(&bytes, bytes.len() as u64) else { panic!("should have a header") };
            tensors
        };
        for (part, wanted) in [
            (Part::Transformer, transformer(&model.config(Part::Transformer).unwrap())),
            (Part::Vae, vae(&model.config(Part::Vae).unwrap(), true)),
            (Part::TextEncoder, clip(&model.config(Part::TextEncoder).unwrap())),
            (Part::TextEncoder2, clip(&model.config(Part::TextEncoder2).unwrap())),
            (Part::TextEncoder3, t5(&model.config(Part::TextEncoder3).unwrap())),
        ] {
            let found = files(part);
            assert_eq!(compare(&found, &wanted), [""; 0], "{part:?}");
            assert_eq!(found.len(), wanted.len(), "{part:?}");
            for tensor in &wanted {
                let without = found.iter().filter(|(name, _)| !tensor.names.contains(name)).map(|(n, t)| (n.clone(), t.clone())).collect();
                assert_eq!(compare(&without, &wanted).len(), 1, "{tensor:?}");
            }
        }
    }

    #[test]
    fn faults_are_folded_by_kind() {
        let wanted = t5(&t5_config());
        let good = tensors(&wanted);
        assert!(compare(&good, &wanted).is_empty());
        let changed = |change: &dyn Fn(&mut Tensors)| {
            let mut tensors = good.clone();
            change(&mut tensors);
            compare(&tensors, &wanted)
        };
        // Another name for the table.
        assert!(
            changed(&|t| {
                let table = t.remove("shared.weight").unwrap();
                t.insert("encoder.embed_tokens.weight".into(), table);
            })
            .is_empty()
        );
        let problems = changed(&|t| {
            t.retain(|name, _| !name.contains("block.1"));
            t.get_mut("shared.weight").unwrap().shape = vec![9, 8];
            t.get_mut("encoder.block.0.layer.1.DenseReluDense.wo.weight").unwrap().dtype = "F8_E4M3".into();
            t.get_mut("encoder.final_layer_norm.weight").unwrap().dtype = "F8_E5M2".into();
        });
        assert_eq!(problems.len(), 4);
        assert!(problems[0].contains("lacks 9 tensors (\"encoder.block.1."), "{problems:?}");
        assert!(problems[1].contains("shared.weight has shape [9, 8], not [8, 8]"), "{problems:?}");
        assert!(problems[2].contains("encoder.final_layer_norm.weight is F8_E5M2"), "{problems:?}");
        assert!(problems[3].contains("shared.weight of shape [9, 8] and type F16 has 128 bytes (and 1 like it)"), "{problems:?}");
        assert!(
            changed(&|t| {
                let x = t["shared.weight"].clone();
                t.insert("encoder.x.scale_weight".into(), x);
            })[0]
                .contains("scaled 8-bit weights")
        );
        assert!(
            changed(&|t| {
                let x = t["shared.weight"].clone();
                t.insert("a.weight.absmax".into(), x);
            })[0]
                .contains("4 bits by bitsandbytes")
        );
        assert!(
            changed(&|t| {
                let x = t["shared.weight"].clone();
                t.insert("a.SCB".into(), x);
            })[0]
                .contains("8 bits")
        );
    }
}
