"""A Hugging Face tokenizer from the metadata of a GGUF file."""

import json
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


class TokenType(IntEnum):
    """GGUF's `tokenizer.ggml.token_type`, as far as a byte-level BPE vocabulary uses it."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4


#: What splits text into words before BPE, by GGUF's `tokenizer.ggml.pre`.
PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
}


def write_tokenizer(metadata: dict[str, Any], directory: Path, model_max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        metadata: The GGUF file's key-value pairs.
        directory: Where to write.
        model_max_length: The model's context length in tokens.

    Raises:
        ValueError: The tokenizer is of a kind that this does not know.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    tokenizer = _build_tokenizer(metadata, tokens)
    tokenizer.save(str(directory / "tokenizer.json"))

    def token_of(role: str) -> str | None:
        token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        return None if token_id is None else tokens[token_id]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": token_of("bos"),
        "eos_token": token_of("eos"),
        "pad_token": token_of("padding"),
        "unk_token": token_of("unknown"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    present = {key: value for key, value in config.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(present, indent=2) + "\n")


def _build_tokenizer(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    kind = metadata["tokenizer.ggml.model"]
    if kind != "gpt2":
        raise ValueError(f"tokenizer model {kind!r} is not supported, only byte-level BPE ('gpt2')")
    pre = metadata["tokenizer.ggml.pre"]
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer {pre!r} is not supported, only {sorted(PRE_TOKENIZERS)}")

    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind_of_token in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True):
        match TokenType(kind_of_token):
            case TokenType.CONTROL:
                tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            case TokenType.USER_DEFINED:
                tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
            case TokenType.NORMAL:
                pass
    return tokenizer
