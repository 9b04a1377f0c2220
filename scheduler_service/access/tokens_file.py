"""The file of bearer tokens: who has which, kept as digests and read again when it changes.

One token a line, `name:token` or `name:sha256:HEX`; `#` starts a comment. Several lines may have
one name, so that a token can be replaced without a gap.
"""

import hashlib
import hmac
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from nanovllm.reloading import Reloading

#: Guessing takes 2**128 attempts with `openssl rand -hex 16`, which has exactly this length.
MIN_TOKEN_CHARS = 32

_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
# RFC 6750, section 2.1.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class TokensFileError(ValueError):
    """The tokens file cannot be used; the message says which line and what to change."""


@dataclass(frozen=True, slots=True)
class _Entry:
    name: str
    digest: bytes


class TokensFile:
    """Answers whose a token is. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises TokensFileError."""
        self._entries = Reloading((path,), lambda: _read(path))

    def name_of(self, token: str) -> str | None:
        """Returns whose token it is, or None.

        Takes the same time for every token that is wrong, and compares digests, of which a caller
        does not control single bytes.
        """
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        name = None
        for entry in self._entries.get():
            if hmac.compare_digest(entry.digest, digest):
                name = entry.name
        return name


def _read(path: Path) -> tuple[_Entry, ...]:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except OSError as error:
        raise TokensFileError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokensFileError(f"{path} is no UTF-8 text") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise TokensFileError(f"{path} is open to every user; run chmod o-rw on it")
    entries: list[_Entry] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.strip()
        if not content or content.startswith("#"):
            continue
        try:
            entry = _parse(content)
        except ValueError as error:
            raise TokensFileError(f"{path}, line {number}: {error}") from error
        if any(other.digest == entry.digest and other.name != entry.name for other in entries):
            raise TokensFileError(f"{path}, line {number}: another name has this token already")
        entries.append(entry)
    if not entries:
        raise TokensFileError(f"{path} holds no token; give at least one line name:token")
    return tuple(entries)


def _parse(line: str) -> _Entry:
    # No message repeats a part of the line: it might be a token.
    name, colon, token = line.partition(":")
    if not colon:
        raise ValueError("no name:token")
    if not _NAME.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, '.', '_', '@' or '-'")
    if token.startswith("sha256:"):
        match = _HASHED.fullmatch(token)
        if match is None:
            raise ValueError("sha256: takes 64 lower-case hexadecimal digits")
        return _Entry(name, bytes.fromhex(match[1]))
    if len(token) < MIN_TOKEN_CHARS:
        raise ValueError(f"a token has at least {MIN_TOKEN_CHARS} characters")
    if not _TOKEN.fullmatch(token):
        raise ValueError("a token has letters, digits and any of -._~+/ with = at its end")
    return _Entry(name, hashlib.sha256(token.encode()).digest())
