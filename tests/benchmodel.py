"""A tiny random model with a tokenizer of characters, in a directory: what `--model` takes, offline."""

from __future__ import annotations

import string
import tempfile
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from liquidfusion.bench.models import Loaded, load, silence
from liquidfusion.bench.terminal import progress

progress.EVERY = 3600.0  # tests compare what is printed, however slow the machine is

_ALPHABET = ["<pad>", "<end>", *string.printable]


@cache
def directory() -> Path:
    """The directory, made once a session."""
    folder = Path(tempfile.mkdtemp(prefix="tiny-")) / "tiny-llama"
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(_ALPHABET)}, [], unk_token="<pad>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", clean_up_tokenization_spaces=False
    )
    config = LlamaConfig(
        vocab_size=len(_ALPHABET),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval()
    with silence():
        model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@cache
def loaded() -> Loaded:
    """The model and tokenizer of `directory`."""
    return load(str(directory()), device="cpu")
