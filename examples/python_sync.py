"""The blocking Python client: a stream, a whole answer, and what an error says.

    python examples/python_sync.py

$NANOVLLM_ADDRESS is the scheduler's address, 127.0.0.1:50051 if unset.
"""

import os

from nanovllm import Client, InvalidRequestError, SamplingParams

address = os.environ.get("NANOVLLM_ADDRESS", "127.0.0.1:50051")
question = [{"role": "user", "content": "Name three rivers in France."}]

with Client(address, timeout_s=120) as client:
    with client.stream(question, SamplingParams(temperature=0, max_tokens=48)) as stream:
        for delta in stream:
            print(delta.text, end="", flush=True)
    print(f"\n[{delta.finish_reason}, {delta.usage}]")

    output = client.generate("The sea is", SamplingParams(n=2, seed=1, max_tokens=12))
    for completion in output.completions:
        print(f"{completion.index}: {completion.text!r}")

    try:
        client.generate("The sea is", SamplingParams(top_p=2))
    except InvalidRequestError as error:
        print(f"refused: {error.fields}")
