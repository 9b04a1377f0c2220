"""OpenAI's own Python package, through the gateway smg.

    make example-openai                # starts everything that is needed
    python examples/openai_sdk.py      # against a gateway that runs

$OPENAI_BASE_URL is the gateway's, http://127.0.0.1:30000/v1 if unset.
"""

import os

from openai import BadRequestError, OpenAI

base_url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:30000/v1")
question = [{"role": "user", "content": "Name three rivers in France."}]

with OpenAI(base_url=base_url, api_key="not-needed") as client:
    model = client.models.list().data[0].id
    print(f"model: {model}")

    stream = client.chat.completions.create(
        model=model, messages=question, temperature=0, max_tokens=48, stream=True
    )
    for event in stream:
        print(event.choices[0].delta.content or "" if event.choices else "", end="", flush=True)
    print()

    answer = client.chat.completions.create(
        model=model, messages=question, seed=1, max_tokens=16, n=2, logprobs=True, top_logprobs=2
    )
    for choice in answer.choices:
        print(f"{choice.index}: {choice.message.content!r} ({choice.finish_reason})")
    print(answer.usage)

    completion = client.completions.create(
        model=model, prompt="One, two, three,", temperature=0, max_tokens=16, stop=["."]
    )
    print(repr(completion.choices[0].text))

    try:
        client.chat.completions.create(
            model=model, messages=question, response_format={"type": "json_object"}
        )
    except BadRequestError as error:
        print(f"refused: {error.message}")
