"""Let a model call a function through the openai package.

It needs a model whose chat template shows tools, such as Qwen/Qwen2.5-1.5B-Instruct:
`liquidfusion serve Qwen/Qwen2.5-1.5B-Instruct --name qwen`, then `python examples/openai_tools.py --model qwen`.
"""

import argparse
import json
from datetime import datetime
from zoneinfo import ZoneInfo

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question", nargs="?", default="What time is it in Tokyo?")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--model", default="smollm2")
parser.add_argument("--key", default="none")
arguments = parser.parse_args()


def clock(zone: str) -> str:
    """The time in a zone such as Asia/Tokyo."""
    return f"{datetime.now(ZoneInfo(zone)):%H:%M}"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "clock",
            "description": "The time in a zone of the tz database, such as Asia/Tokyo",
            "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
        },
    }
]

client = OpenAI(base_url=arguments.url, api_key=arguments.key)
messages = [{"role": "user", "content": arguments.question}]
for _ in range(4):
    answer = client.chat.completions.create(model=arguments.model, messages=messages, tools=TOOLS, temperature=0)
    message = answer.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        print(message.content)
        break
    for call in message.tool_calls:
        try:
            result = clock(**json.loads(call.function.arguments))
        except (ValueError, TypeError, KeyError) as error:
            result = f"error: {error}"  # the model may try again
        print(f"{call.function.name}({call.function.arguments}) = {result}")
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
