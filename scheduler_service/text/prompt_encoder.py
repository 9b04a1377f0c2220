"""Tokenizes prompts off the event loop and bounds what a prompt may cost."""

import asyncio
import contextlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from scheduler_service.errors import InvalidFieldError, TokenizerBusyError
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import ChatPrompt, Prompt, TextPrompt, TokenPrompt

# What a client should wait when the threads have too much to do; they need seconds at most.
_RETRY_AFTER_S = 1.0
T = TypeVar("T")


class PromptEncoder:
    """Turns prompts into token ids on threads of its own."""

    def __init__(
        self, tokenizer: Tokenizer, num_threads: int = 2, max_pending_bytes: int = 64 << 20
    ) -> None:
        """Starts the threads; `max_pending_bytes` bounds what waits for them, in memory."""
        self._tokenizer = tokenizer
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = 0
        # Work waits here rather than in the pool's queue, which keeps what was cancelled.
        self._idle_threads = asyncio.Semaphore(num_threads)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenizer")

    async def encode(
        self, prompt: Prompt, *, max_tokens: int, add_special_tokens: bool = True
    ) -> list[int]:
        """Token ids, at least one and at most `max_tokens`. Raises InvalidFieldError."""
        match prompt:
            case TokenPrompt(token_ids):
                field = "token_ids"
            case TextPrompt(text):
                field = "text"
                self._check_length(field, text, max_tokens)
                token_ids = await self._run(
                    sys.getsizeof(text), lambda: self._encode(text, add_special_tokens)
                )
            case ChatPrompt():
                field = "chat"
                token_ids = await self._run(
                    _num_bytes(prompt), lambda: self._encode_chat(prompt, max_tokens)
                )
        if not token_ids:
            raise InvalidFieldError(field, "the prompt has no tokens")
        if len(token_ids) > max_tokens:
            raise _too_long(field, f"has {len(token_ids)} tokens", max_tokens)
        return token_ids

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""
        return await self._run(
            sys.getsizeof(token_ids),
            lambda: self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens),
        )

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, num_bytes: int, work: Callable[[], T]) -> T:
        """Runs `work`, which holds `num_bytes`, on a thread. Raises TokenizerBusyError."""
        if self._pending_bytes and self._pending_bytes + num_bytes > self._max_pending_bytes:
            raise TokenizerBusyError(
                f"{self._pending_bytes} bytes of text wait for tokenization, the limit is "
                f"{self._max_pending_bytes}; try again later",
                _RETRY_AFTER_S,
            )
        loop = asyncio.get_running_loop()

        def release() -> None:
            self._pending_bytes -= num_bytes
            self._idle_threads.release()

        def release_from_thread(_: object) -> None:
            # Closed if the process is about to end.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(release)

        self._pending_bytes += num_bytes
        try:
            await self._idle_threads.acquire()
        except asyncio.CancelledError:
            self._pending_bytes -= num_bytes
            raise
        # Even if nobody waits for it any more, the thread is busy until the work is done.
        future = self._threads.submit(work)
        future.add_done_callback(release_from_thread)
        return await asyncio.wrap_future(future)

    def _encode_chat(self, prompt: ChatPrompt, max_tokens: int) -> list[int]:
        text = self._tokenizer.render_chat(
            prompt.turns,
            add_generation_prompt=prompt.add_generation_prompt,
            template_kwargs_json=prompt.template_kwargs_json,
        )
        self._check_length("chat", text, max_tokens)
        # The template writes its special tokens itself.
        return self._encode(text, False)

    def _check_length(self, field: str, text: str, max_tokens: int) -> None:
        # Megabytes of text would keep a thread busy for seconds just to be refused.
        least = self._tokenizer.least_num_tokens(text)
        if least > max_tokens:
            raise _too_long(field, f"has at least {least} tokens", max_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _num_bytes(prompt: ChatPrompt) -> int:
    """What a conversation takes up; every part of it is as long as its caller likes."""
    turns = sum(sys.getsizeof(turn.role) + sys.getsizeof(turn.content) for turn in prompt.turns)
    return turns + sys.getsizeof(prompt.template_kwargs_json)


def _too_long(field: str, finding: str, max_tokens: int) -> InvalidFieldError:
    return InvalidFieldError(
        field, f"the prompt {finding}, but this call takes at most {max_tokens}"
    )
