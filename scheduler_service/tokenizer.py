"""Text to token ids and back, and the model's chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import Tokenizer as RustTokenizer

from scheduler_service.errors import InvalidFieldError
from scheduler_service.model_spec import ModelSpecError


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str


class Tokenizer:
    """The model's tokenizer. Thread-safe; `encode` and `render_chat` may be slow for long input."""

    def __init__(self, directory: Path) -> None:
        """Loads tokenizer.json and the chat template. Raises ModelSpecError."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelSpecError(f"{path} is missing; only fast tokenizers are supported")
        try:
            self._tokenizer = RustTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelSpecError(f"{path} is no valid tokenizer: {error}") from error
        # A truncating or padding setting saved with the tokenizer would corrupt prompts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._chat_tokenizer = _load_chat_tokenizer(directory)
        self._max_token_chars = max(map(len, self._tokenizer.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return bool(getattr(self._chat_tokenizer, "chat_template", None))

    def least_num_tokens(self, text: str) -> int:
        """A lower bound of the tokens of `text` that costs nothing.

        Holds because a token stands for at most as many characters as its entry in the vocabulary.
        """
        return len(text) // self._max_token_chars

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; incomplete UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self, turns: Sequence[ChatTurn], *, add_generation_prompt: bool, template_kwargs_json: str
    ) -> str:
        """Prompt of a conversation. Raises InvalidFieldError."""
        if not self.has_chat_template:
            raise InvalidFieldError("chat", "the model has no chat template; send text instead")
        kwargs = _template_kwargs(template_kwargs_json)
        try:
            return self._chat_tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **kwargs,
            )
        except jinja2.TemplateError as error:
            raise InvalidFieldError(
                "chat", f"the model's chat template refused it: {error}"
            ) from error
        except Exception as error:  # a template is a program and may raise anything
            raise InvalidFieldError(
                "chat", f"the model's chat template cannot render it: {error}"
            ) from error


def _load_chat_tokenizer(directory: Path) -> Any:
    # This class, unlike AutoTokenizer, does not import torch.
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception as error:  # transformers raises many kinds for malformed files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelSpecError(f"{directory} holds no usable tokenizer files: {reason}") from error


_RESERVED_KWARGS = {"tokenize", "add_generation_prompt", "conversation", "chat_template"}


def _template_kwargs(text: str) -> dict[str, Any]:
    field = "chat.template_kwargs_json"
    if not text:
        return {}
    try:
        kwargs = json.loads(text)
    except ValueError as error:
        raise InvalidFieldError(field, f"no valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidFieldError(field, "nested too deeply") from error
    if not isinstance(kwargs, dict):
        raise InvalidFieldError(field, "must be a JSON object")
    if reserved := sorted(_RESERVED_KWARGS & kwargs.keys()):
        raise InvalidFieldError(field, f"{', '.join(reserved)} cannot be set here")
    return kwargs
