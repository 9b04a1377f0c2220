"""Servers with OpenAI's HTTP API as targets of a load run.

https://platform.openai.com/docs/api-reference/chat-streaming and .../completions
"""

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp

from nanovllm.channel import is_local
from nanovllm.load.requests import LoadRequest
from nanovllm.load.sse import SseDecoder
from nanovllm.load.target import Piece, RequestFailedError
from nanovllm.outputs import Usage

_CONNECT_TIMEOUT_S = 30.0
_ERROR_CHARS = 400


class OpenAITarget:
    """A server that speaks the API of OpenAI; use it with `async with`, in one event loop.

    Text and token ids go to /completions, chat messages to /chat/completions.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares the connections.

        Args:
            base_url: With the version, for example http://127.0.0.1:8000/v1.
            model: The name under which the server knows the model.
            api_key: For the header Authorization; default: none is sent.
            extra_body: Fields to set in every request, over those that the tool sets; None as a
                value removes a field.

        Raises:
            ValueError: `base_url` is no URL of HTTP.
        """
        scheme, separator, rest = base_url.partition("://")
        host = rest.partition("/")[0]
        if scheme not in ("http", "https") or not separator or not host:
            raise ValueError(f"{base_url!r} is no URL; give one such as http://127.0.0.1:8000/v1")
        self._url = base_url.rstrip("/")
        self._model = model
        self._extra_body = dict(extra_body or {})
        self._session = aiohttp.ClientSession(
            # Connections are kept and as many as needed; the run limits what is under way.
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            # As for gRPC: what stays on this machine goes through no proxy.
            trust_env=not is_local(host if ":" in host else f"{host}:80"),
        )

    async def __aenter__(self) -> "OpenAITarget":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def answer(self, request: LoadRequest) -> AsyncIterator[Piece]:
        """See `Target`."""
        path, body = request_body(request, self._model, self._extra_body)
        reader = ChunkReader()
        decoder = SseDecoder()
        try:
            async with self._session.post(f"{self._url}{path}", json=body) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.text(errors="replace"))
                async for data in response.content.iter_any():
                    for event in decoder.feed(data):
                        if (piece := reader.read(event)) is not None:
                            yield piece
        except (aiohttp.ClientError, OSError) as error:
            raise RequestFailedError("CONNECTION", f"{self._url}: {error}") from error


class ChunkReader:
    """Reads the chunks of one streamed answer."""

    def __init__(self) -> None:
        self._num_tokens = 0

    def read(self, event: str) -> Piece | None:
        """Returns what a chunk says, None for the mark at the end of the stream.

        A chunk with text counts as one token, unless it carries a running count of tokens.

        Raises:
            RequestFailedError: It is no chunk, or the server reports an error in it.
        """
        if event == "[DONE]":
            return None
        try:
            chunk = json.loads(event)
            error = chunk.get("error")
            choices = chunk.get("choices") or []
            usage = _usage(chunk.get("usage"))
            text, finish_reason = _choice(choices[0]) if choices else ("", None)
        except (ValueError, AttributeError, KeyError, TypeError) as broken:
            raise RequestFailedError("BAD STREAM", f"no chunk: {event:.80}") from broken
        if error is not None:
            raise RequestFailedError("STREAM ERROR", _message(error))
        num_tokens = int(bool(text))
        if usage is not None and choices:
            num_tokens = max(0, usage.completion_tokens - self._num_tokens)
        self._num_tokens += num_tokens
        return Piece(
            num_tokens=num_tokens, text=text, is_last=finish_reason is not None, usage=usage
        )


def request_body(
    request: LoadRequest, model: str, extra_body: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Returns the path and the JSON body of a request.

    Only fields of OpenAI's own API are set; servers that have more take them from `extra_body`.
    """
    prompt = request.prompt
    # What text is made of is text again.
    is_chat = isinstance(prompt[0], Mapping)
    params = request.sampling_params
    body: dict[str, Any] = {
        "model": model,
        "messages" if is_chat else "prompt": prompt,
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "seed": params.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra_body,
    }
    kept = {name: value for name, value in body.items() if value is not None}
    return "/chat/completions" if is_chat else "/completions", kept


def _choice(choice: Mapping[str, Any]) -> tuple[str, str | None]:
    if "delta" in choice:
        delta = choice["delta"]
        # Servers of reasoning models stream the thinking beside the content, under either name.
        texts = (delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content"))
        text = "".join(part for part in texts if part)
    else:
        text = choice["text"] or ""
    return text, choice.get("finish_reason")


def _usage(usage: Mapping[str, Any] | None) -> Usage | None:
    if usage is None:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
    )


def _refusal(status: int, text: str) -> RequestFailedError:
    try:
        message = _message(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        message = text[:_ERROR_CHARS] or "no message"
    # 503 is how servers of this API say that they are full, where they do not say 429.
    is_refusal = 400 <= status < 500 or status == 503
    return RequestFailedError(f"HTTP {status}", message, is_refusal=is_refusal)


def _message(error: Any) -> str:
    message = error.get("message") if isinstance(error, Mapping) else None
    return str(message or error)[:_ERROR_CHARS]
