"""Answer at the end of a long prompt in a few megabytes: the prompt is fed in chunks, the cache keeps its budget."""

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch

import liquidfusion as lf
from liquidfusion.bench.models import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a local directory or a hub id")
    parser.add_argument("--file", type=Path, help="text to read (default: Python's own reference manual)")
    parser.add_argument("--strategy", default="liquid_fusion")
    parser.add_argument("--budget", type=int, default=512, help="tokens that the cache may hold")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="a short prompt and a short answer")
    args = parser.parse_args()

    loaded = load(args.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    text = args.file.read_text() if args.file else "\n\n".join(topics[name] for name in sorted(topics))
    inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=640 if args.quick else 6000).to(
        model.device
    )
    prompt = inputs["input_ids"].shape[1]

    cache = lf.KVCache(model, strategy=args.strategy, budget=args.budget)
    output = model.generate(
        **inputs,
        **{lf.cache_keyword(model): cache},
        prefill_chunk_size=256,  # memory never exceeds budget + chunk, however long the prompt
        max_new_tokens=8 if args.quick else args.max_tokens,
        do_sample=False,
    )

    print(tokenizer.decode(output[0, prompt:], skip_special_tokens=True))
    full = full_mib(model, output.shape[1])
    print(f"\n{prompt} prompt tokens, {cache.nbytes / 2**20:.1f} MiB of cache; a full one would hold {full:.1f} MiB")
    kept = sorted(position for position in cache.positions(0)[0, 0].tolist() if position >= 0)
    print(f"layer 0, head 0 keeps {len(kept)} tokens: {kept[:6]} … {kept[-3:]}")


def full_mib(model: torch.nn.Module, tokens: int) -> float:
    """MiB of keys and values if every token were kept."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * tokens
    return values * model.dtype.itemsize / 2**20


if __name__ == "__main__":
    main()
