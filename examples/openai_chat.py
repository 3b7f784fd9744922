"""Chat with a LiquidFusion server through the openai package: `liquidfusion serve`, then this.

Each turn sends the whole conversation, as OpenAI's interface wants it; the server reads only what is new.
"""

import argparse
import sys

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--model", default="smollm2")
parser.add_argument("--key", default="none")
arguments = parser.parse_args()

client = OpenAI(base_url=arguments.url, api_key=arguments.key)
messages = []
print("> ", end="", flush=True)
for line in sys.stdin:
    messages.append({"role": "user", "content": line.strip()})
    stream = client.chat.completions.create(
        model=arguments.model,
        messages=messages,
        max_completion_tokens=200,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    answer, usage = "", None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            answer += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
    messages.append({"role": "assistant", "content": answer})
    cached = usage.prompt_tokens_details.cached_tokens
    print(
        f"\n[{usage.prompt_tokens} tokens before the answer, {usage.prompt_tokens - cached} of them read now]\n> ",
        end="",
    )
print()
