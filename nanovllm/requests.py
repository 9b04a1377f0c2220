"""Building the messages that clients send."""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, TypeAlias

from nanovllm.sampling_params import SamplingParams
from nanovllm.v1 import inference_pb2 as pb

#: {"role": ..., "content": ...}
Message: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation with options for the model's chat template."""

    messages: Iterable[Message]
    #: Whether the prompt ends with the header of an assistant message.
    add_generation_prompt: bool = True
    #: Further template variables, for example {"enable_thinking": False}.
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


#: Text, token ids, messages, a `Chat`, or vLLM's {"prompt": text} and {"prompt_token_ids": ids}.
Prompt: TypeAlias = str | Iterable[int] | Iterable[Message] | Chat | Mapping[str, Any]


def generate_request(
    prompt: Prompt,
    sampling_params: SamplingParams | None = None,
    *,
    request_id: str | None = None,
    priority: int = 0,
    cache_salt: str = "",
) -> pb.GenerateRequest:
    """Builds a request; without a `request_id` it gets a random one.

    Raises:
        TypeError: `prompt` is none of the kinds above.
    """
    request = pb.GenerateRequest(
        request_id=request_id or uuid.uuid4().hex,
        sampling_params=(sampling_params or SamplingParams()).to_proto(),
        priority=priority,
        cache_salt=cache_salt,
    )
    match _prompt_message(prompt):
        case str() as text:
            request.text = text
        case pb.TokenIds() as token_ids:
            request.token_ids.CopyFrom(token_ids)
        case pb.ChatMessages() as chat:
            request.chat.CopyFrom(chat)
    return request


def tokenize_request(prompt: Prompt, add_special_tokens: bool | None = None) -> pb.TokenizeRequest:
    """Builds a request for token ids.

    Raises:
        TypeError: `prompt` is neither text nor a conversation.
    """
    request = pb.TokenizeRequest(add_special_tokens=add_special_tokens)
    match _prompt_message(prompt):
        case str() as text:
            request.text = text
        case pb.ChatMessages() as chat:
            request.chat.CopyFrom(chat)
        case _:
            raise TypeError("tokenize takes text or chat messages; these are token ids already")
    return request


def detokenize_request(
    token_ids: Iterable[int], skip_special_tokens: bool | None = None
) -> pb.DetokenizeRequest:
    """Builds a request for text."""
    return pb.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)


def _prompt_message(prompt: Prompt) -> str | pb.TokenIds | pb.ChatMessages:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Chat):
        return _chat_message(prompt)
    if isinstance(prompt, Mapping):
        if set(prompt) == {"prompt"}:
            return _prompt_message(prompt["prompt"])
        if set(prompt) == {"prompt_token_ids"}:
            return pb.TokenIds(ids=prompt["prompt_token_ids"])
        raise TypeError(
            'a prompt given as a dict has exactly the key "prompt" or "prompt_token_ids", '
            f"got {sorted(map(str, prompt))}"
        )
    if isinstance(prompt, Iterable) and not isinstance(prompt, bytes):
        items: list[Any] = list(prompt)
        if all_integers(items):
            return pb.TokenIds(ids=items)
        if all(isinstance(item, Mapping) for item in items):
            return _chat_message(Chat(items))
    raise TypeError(
        "a prompt is text, a list of token ids, or a list of chat messages such as "
        f'{{"role": "user", "content": "..."}}; got {prompt!r:.80}'
    )


def all_integers(items: list[Any]) -> bool:
    """Whether these are token ids, whatever integer types they have."""
    # The usual case first: the abstract class takes a microsecond an item, and prompts are long.
    return set(map(type, items)) <= {int} or all(isinstance(item, Integral) for item in items)


def _chat_message(chat: Chat) -> pb.ChatMessages:
    messages = []
    for message in chat.messages:
        if set(message) != {"role", "content"} or not all(
            isinstance(value, str) for value in message.values()
        ):
            raise TypeError(
                'a chat message has exactly the keys "role" and "content", both text; '
                f"got {message!r:.80}"
            )
        messages.append(pb.ChatMessage(role=message["role"], content=message["content"]))
    return pb.ChatMessages(
        messages=messages,
        add_generation_prompt=chat.add_generation_prompt,
        template_kwargs_json=json.dumps(chat.template_kwargs) if chat.template_kwargs else "",
    )
