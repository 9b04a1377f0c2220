"""Text to token ids and back, and the model's chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from scheduler_service.errors import InvalidFieldError
from scheduler_service.model_spec import ModelSpecError
from scheduler_service.text.chat_template import ChatRenderer, TemplateError


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """One message of a conversation."""

    role: str
    content: str


class Tokenizer:
    """The model's tokenizer. Thread-safe; `encode` and `render_chat` may be slow for long input."""

    def __init__(self, directory: Path, renderer: ChatRenderer | None = None) -> None:
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
        self._renderer = renderer or ChatRenderer()
        self._max_token_chars = max(map(len, self._tokenizer.get_vocab()), default=1)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return bool(getattr(self._chat_tokenizer, "chat_template", None))

    def warm_up(self) -> None:
        """Saves the first conversation a second; returns at once."""
        if self.has_chat_template:
            self._renderer.warm_up()

    def close(self) -> None:
        """Ends the processes that render conversations."""
        self._renderer.close()

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
        if add_generation_prompt and kwargs.get("continue_final_message"):
            raise InvalidFieldError(
                _KWARGS_FIELD, "continue_final_message needs add_generation_prompt=false"
            )
        try:
            template = self._chat_tokenizer.get_chat_template(tools=kwargs.get("tools"))
        except ValueError as error:
            raise InvalidFieldError("chat", "the model has no default chat template") from error
        try:
            return self._renderer.render(
                template,
                [{"role": turn.role, "content": turn.content} for turn in turns],
                {**self._chat_tokenizer.special_tokens_map, **kwargs},
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateError as error:
            raise InvalidFieldError("chat", f"the model's chat template {error}") from error


def _load_chat_tokenizer(directory: Path) -> Any:
    # This class, unlike AutoTokenizer, does not import torch, and runs no code of the checkpoint
    # whatever its auto_map says.
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
    except Exception as error:  # transformers raises many kinds for malformed files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ModelSpecError(f"{directory} holds no usable tokenizer files: {reason}") from error
    _check_template_sizes(tokenizer)
    return tokenizer


#: Longest template that is accepted; real ones have some ten thousand characters.
MAX_TEMPLATE_CHARS = 256 * 1024
#: Largest template_kwargs_json, which may describe tools, and its deepest nesting.
MAX_TEMPLATE_KWARGS_BYTES = 256 * 1024
MAX_TEMPLATE_KWARGS_DEPTH = 32

_KWARGS_FIELD = "chat.template_kwargs_json"
_RESERVED_KWARGS = {
    "add_generation_prompt",
    "chat_template",
    "conversation",
    "conversations",
    "messages",
    "return_assistant_tokens_mask",
    "tokenize",
}


def _check_template_sizes(tokenizer: Any) -> None:
    templates = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates or ""]:
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARS:
            raise ModelSpecError(
                f"a chat template is text of at most {MAX_TEMPLATE_CHARS} characters"
            )


def _template_kwargs(text: str) -> dict[str, Any]:
    if not text:
        return {}
    if len(text.encode()) > MAX_TEMPLATE_KWARGS_BYTES:
        raise InvalidFieldError(_KWARGS_FIELD, f"at most {MAX_TEMPLATE_KWARGS_BYTES} bytes")
    try:
        kwargs = json.loads(text)
    except ValueError as error:
        raise InvalidFieldError(_KWARGS_FIELD, f"no valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidFieldError(_KWARGS_FIELD, "nested too deeply") from error
    if not isinstance(kwargs, dict):
        raise InvalidFieldError(_KWARGS_FIELD, "must be a JSON object")
    if _depth(kwargs) > MAX_TEMPLATE_KWARGS_DEPTH:
        raise InvalidFieldError(
            _KWARGS_FIELD, f"nested too deeply, at most {MAX_TEMPLATE_KWARGS_DEPTH} levels"
        )
    if reserved := sorted(_RESERVED_KWARGS & kwargs.keys()):
        raise InvalidFieldError(_KWARGS_FIELD, f"{', '.join(reserved)} cannot be set here")
    return kwargs


def _depth(value: Any) -> int:
    """Levels of objects and lists, found without recursion."""
    depth, level = 0, [value]
    while containers := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [
            child
            for item in containers
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth
