"""Models whose weights are quantised: wrappers in place of `nn.Linear`, torch's own, and GGUF files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import liquidfusion as lf
from liquidfusion.geometry import layer_devices
from tiny import ALL_MODELS, build, cache_keyword, clear_steps, padded

STRATEGIES = tuple(info["name"] for info in lf.strategies())
LENGTHS, NEW, BUDGET = (9, 17), 10, 12
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows and a float32 scale for each."""
    scales = weight.abs().amax(1, keepdim=True).float() / 127
    return (weight / scales).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """As bitsandbytes' `Linear8bitLt`: `weight` is a parameter of integers, and the output has the input's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        integers, scales = rounded(weight)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.weight * self.scales).to(x.dtype), self.bias)


class PackedLinear(nn.Module):
    """As GPTQ's and AWQ's layers: no parameter at all, everything lies in buffers of other names."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        integers, scales = rounded(weight)
        for name, tensor in (("qweight", integers), ("scales", scales), ("offsets", bias)):
            self.register_buffer(name, None if tensor is None else tensor.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, (self.qweight * self.scales).to(x.dtype), self.offsets)


def dense(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """What the wrappers compute, as an ordinary layer."""
    integers, scales = rounded(weight)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight.data, linear.bias = integers * scales, bias
    return linear


def replaced(model: PreTrainedModel, make: Callable[[Tensor, Tensor | None], nn.Module]) -> PreTrainedModel:
    """Every matrix product of the model, its head's too, made by `make(weight [outputs, inputs], bias)`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            model.set_submodule(name, make(weight.detach(), module.bias))
    return model


def generate(model: PreTrainedModel, cache: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, list[int]]:
    """New tokens of a padded batch, and how many of each row are certain."""
    ids, mask = padded(lengths, seed=3)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **{cache_keyword(model): cache},
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], [clear_steps(row) for row in torch.stack(out.logits, 1)]


def assert_same(got: Tensor, expected: Tensor, certain: list[int]) -> None:
    assert min(certain) > NEW // 2, "the reference itself is a coin toss"
    for own, other, steps in zip(got.tolist(), expected.tolist(), certain, strict=True):
        assert own[:steps] == other[:steps]


@pytest.mark.parametrize("wrapper", [Int8Linear, PackedLinear])
@pytest.mark.parametrize("name", ALL_MODELS)
def test_wrapped_layers(name: str, wrapper: Callable[[Tensor, Tensor | None], nn.Module]) -> None:
    """With room transformers' own tokens; with little the tokens and positions of the same weights, unwrapped."""
    model, twin = replaced(build(name), wrapper), replaced(build(name), dense)
    assert not any(isinstance(module, nn.Linear | Conv1D) for module in model.modules())
    expected, certain = generate(model, transformers.DynamicCache(config=model.config))
    for strategy in STRATEGIES:
        assert_same(generate(model, lf.KVCache(model, strategy, max(LENGTHS) + NEW))[0], expected, certain)
        tight, plain = lf.KVCache(model, strategy, BUDGET), lf.KVCache(twin, strategy, BUDGET)
        got, (other, sure) = generate(model, tight), generate(twin, plain)
        assert_same(got[0], other, sure)
        assert tight.evictions == plain.evictions
        assert tight.nbytes == plain.nbytes
        if strategy != "full":
            assert tight.evictions > 0
            assert all(tight.positions(layer).shape[2] <= BUDGET for layer in range(len(tight)))


def test_positions_relative_to_the_cache() -> None:
    """Rotary positions come from the configuration too."""
    model, twin = replaced(build("llama"), Int8Linear), replaced(build("llama"), dense)
    caches = [lf.KVCache(m, "liquid_fusion", BUDGET, positions="cache") for m in (model, twin)]
    got, (expected, certain) = generate(model, caches[0]), generate(twin, caches[1])
    assert_same(got[0], expected, certain)
    assert torch.equal(caches[0].positions(1), caches[1].positions(1))


def mixed() -> PreTrainedModel:
    """Embeddings in bfloat16 and norms in float32, so that keys are float32 while `model.dtype` says bfloat16."""
    model = replaced(build("llama"), Int8Linear)
    model.get_input_embeddings().bfloat16()
    assert model.dtype == torch.bfloat16
    return model


@pytest.mark.parametrize("how", ["file", "copy"])
def test_sessions_take_their_dtype_from_the_slots(tmp_path: Path, how: str) -> None:
    model = mixed()
    expected, certain = generate(model, transformers.DynamicCache(config=model.config))
    kv = lf.KVCache(model, "h2o", BUDGET)
    assert_same(generate(model, lf.KVCache(model, "h2o", max(LENGTHS) + NEW))[0], expected, certain)
    first, _ = generate(model, kv)
    assert kv.keys_values(0)[0].dtype == torch.float32
    if how == "file":
        kv.save(tmp_path / "talk")
        same = mixed()  # a cache does not keep its model
        other = lf.KVCache.load(tmp_path / "talk", same)
    else:
        other = kv.copy()
    ids, mask = padded(LENGTHS, seed=3)
    ids, mask = torch.cat([ids, first], 1), F.pad(mask, (0, NEW), value=1)
    tokens = [
        cache.model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **{cache_keyword(model): cache}
        )
        for cache in (kv, other)
    ]
    assert torch.equal(*tokens)
    assert torch.equal(kv.positions(1), other.positions(1))


def test_layers_without_a_parameter_tell_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded session's slots lie where a layer's buffers are."""
    model = replaced(build("llama"), PackedLinear)
    elsewhere = torch.device("cuda", 1)

    class Far:
        device = elsewhere

    attention = model.model.layers[1].self_attn
    assert not list(attention.parameters())
    monkeypatch.setattr(attention, "buffers", lambda: iter([Far()]))
    assert layer_devices(model) == [torch.device("cpu"), elsewhere]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch has no kernels for it here")
def test_torchs_own_dynamic_quantisation() -> None:
    """Layers whose `weight` is a method."""
    lengths = (17, 17)  # what lies in padding would count when activations are rounded
    model = torch.ao.quantization.quantize_dynamic(build("llama"), {nn.Linear}, torch.qint8)
    assert callable(model.model.layers[0].self_attn.k_proj.weight)
    expected, certain = generate(model, transformers.DynamicCache(config=model.config), lengths)
    for strategy in STRATEGIES:
        got, _ = generate(model, lf.KVCache(model, strategy, max(lengths) + NEW), lengths)
        assert_same(got, expected, certain)
        tight = lf.KVCache(model, strategy, BUDGET)
        generate(model, tight, lengths)
        assert strategy == "full" or tight.evictions > 0


def gguf_file(model: PreTrainedModel, path: Path) -> Path:
    """A Llama in llama.cpp's format: matrices in blocks of 32 8-bit integers, everything else in float32."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        weight, module = tensor.numpy(), name.removesuffix(".weight")
        if module in outer:
            target = outer[module]
        else:
            layer, module = module.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{layer}.{names[module]}"
        if module in ("self_attn.q_proj", "self_attn.k_proj"):  # llama.cpp interleaves the rotated halves
            heads = config.num_attention_heads if module[-6] == "q" else config.num_key_value_heads
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if weight.ndim == 2:
            packed = gguf.quants.quantize(np.ascontiguousarray(weight), Q8_0)
            writer.add_tensor(f"{target}.weight", packed, raw_dtype=Q8_0)
        else:
            writer.add_tensor(f"{target}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore")
def test_gguf(tmp_path: Path) -> None:
    """A file made here: with room transformers' own tokens, with little those of the same weights without a file."""
    config = copy.deepcopy(build("llama").config)
    config.hidden_size, config.intermediate_size, config.head_dim = 64, 96, 16  # rows of whole blocks
    torch.manual_seed(0)
    original = transformers.LlamaForCausalLM(config).eval()
    for weight in original.parameters():
        if weight.dim() == 2:
            blocks = gguf.quants.quantize(weight.data.numpy(), Q8_0)
            weight.data = torch.from_numpy(gguf.quants.dequantize(blocks, Q8_0))
    path = gguf_file(original, tmp_path / "tiny.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    for each in (original, model):
        each.generation_config = copy.deepcopy(build("llama").generation_config)
    expected, certain = generate(model, transformers.DynamicCache(config=model.config))
    for strategy in STRATEGIES:
        assert_same(generate(model, lf.KVCache(model, strategy, max(LENGTHS) + NEW))[0], expected, certain)
        tight, plain = lf.KVCache(model, strategy, BUDGET), lf.KVCache(original, strategy, BUDGET)
        got, (other, sure) = generate(model, tight), generate(original, plain)
        assert_same(got[0], other, sure)
        assert torch.equal(tight.positions(1), plain.positions(1))
        assert strategy == "full" or tight.evictions > 0
