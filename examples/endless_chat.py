"""A chat whose memory never grows: one cache lives through all turns, each turn feeds only what is new."""

import argparse
import sys

import torch

import liquidfusion as lf
from liquidfusion.bench.models import load

QUESTIONS = [
    "What is a good name for a cat?",
    "Name three fruits that grow on trees.",
    "How do I boil an egg?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a local directory or a hub id")
    parser.add_argument("--strategy", default="liquid_fusion")
    parser.add_argument("--budget", type=int, default=256, help="tokens that the cache may hold")
    parser.add_argument("--max-tokens", type=int, default=60, help="longest answer")
    parser.add_argument("--turns", type=int, default=10, help="questions asked when nobody types")
    parser.add_argument("--quick", action="store_true", help="two short turns, nobody types")
    args = parser.parse_args()
    if args.quick:
        args.turns, args.max_tokens = 2, 8

    loaded = load(args.model)
    model, tokenizer = loaded.model, loaded.tokenizer
    cache = lf.KVCache(model, strategy=args.strategy, budget=args.budget)
    messages, fed = [], ""
    for question in typed() if sys.stdin.isatty() and not args.quick else asked(args.turns):
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        new = text.removeprefix(fed)  # the template's text so far, without what the cache has seen
        logits = feed(model, cache, tokenizer(new, return_tensors="pt", add_special_tokens=False)["input_ids"])
        answer = []
        while len(answer) < args.max_tokens and (token := int(logits.argmax())) != tokenizer.eos_token_id:
            answer.append(token)
            logits = feed(model, cache, torch.tensor([[token]]))
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        fed = text + messages[-1]["content"]
        print(f"> {question}\n{messages[-1]['content'].strip()}")
        print(f"  [{cache.get_seq_length()} tokens so far, {cache.nbytes / 2**20:.2f} MiB of cache]\n")


@torch.inference_mode()
def feed(model: torch.nn.Module, cache: lf.KVCache, ids: torch.Tensor) -> torch.Tensor:
    """Run the new tokens through the model and return the logits that follow them."""
    output = model(ids.to(model.device), **{lf.cache_keyword(model): cache}, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1]


def asked(turns: int) -> list[str]:
    """Return that many questions, again from the first when they run out."""
    return [QUESTIONS[turn % len(QUESTIONS)] for turn in range(turns)]


def typed():
    """Yield lines from the terminal until it ends."""
    print("Type a question; Ctrl-D ends.")
    for line in sys.stdin:
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    main()
