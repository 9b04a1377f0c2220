"""Tokenizes prompts off the event loop and bounds what a prompt may cost."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from scheduler_service.errors import InvalidFieldError
from scheduler_service.tokenizer import Tokenizer
from scheduler_service.validation import ChatPrompt, Prompt, TextPrompt, TokenPrompt


class PromptEncoder:
    """Turns prompts into token ids on threads of its own."""

    def __init__(self, tokenizer: Tokenizer, num_threads: int = 2) -> None:
        self._tokenizer = tokenizer
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
                token_ids = await self._run(
                    self._encode, field, text, max_tokens, add_special_tokens
                )
            case ChatPrompt():
                field = "chat"
                token_ids = await self._run(self._encode_chat, prompt, max_tokens)
        if not token_ids:
            raise InvalidFieldError(field, "the prompt has no tokens")
        if len(token_ids) > max_tokens:
            raise _too_long(field, f"has {len(token_ids)} tokens", max_tokens)
        return token_ids

    async def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """Text of token ids."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads,
            lambda: self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens),
        )

    def close(self) -> None:
        """Ends the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, function: Callable[..., list[int]], *arguments: object) -> list[int]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    def _encode_chat(self, prompt: ChatPrompt, max_tokens: int) -> list[int]:
        text = self._tokenizer.render_chat(
            prompt.turns,
            add_generation_prompt=prompt.add_generation_prompt,
            template_kwargs_json=prompt.template_kwargs_json,
        )
        # The template writes its special tokens itself.
        return self._encode("chat", text, max_tokens, False)

    def _encode(
        self, field: str, text: str, max_tokens: int, add_special_tokens: bool
    ) -> list[int]:
        # Megabytes of text would keep a thread busy for seconds just to be refused.
        least = self._tokenizer.least_num_tokens(text)
        if least > max_tokens:
            raise _too_long(field, f"has at least {least} tokens", max_tokens)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _too_long(field: str, finding: str, max_tokens: int) -> InvalidFieldError:
    return InvalidFieldError(
        field, f"the prompt {finding}, but this call takes at most {max_tokens}"
    )
