"""The tokenizer's files as one zip, for gateways that do not have the model's directory."""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

# As far as the model has them. config.json says which family the tokenizer belongs to.
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_CHUNK_BYTES = 1 << 20
# Zip has no earlier time. A fixed one makes equal files an equal archive.
_TIME = (1980, 1, 1, 0, 0, 0)


class TokenizerArchive:
    """Made when it is first asked for, then kept: the directory may be gone by the second time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @cached_property
    def content(self) -> bytes:
        """The zip. Reading and packing take a second for a large vocabulary. Raises OSError."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in self._present():
                info = zipfile.ZipInfo(path.name, _TIME)
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, path.read_bytes())
        return buffer.getvalue()

    @cached_property
    def sha256(self) -> str:
        """Hash of the zip, hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """The zip in pieces that fit a message."""
        for start in range(0, len(self.content), _CHUNK_BYTES):
            yield self.content[start : start + _CHUNK_BYTES]

    def _present(self) -> list[Path]:
        return [path for name in _FILES if (path := self._directory / name).is_file()]
