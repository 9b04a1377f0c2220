"""The file of bearer tokens."""

import hashlib
import hmac
import os
from pathlib import Path

import pytest

from scheduler_service.access.tokens_file import TokensFile, TokensFileError

ALICE = "a" * 32
BOB = "b" * 40


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_tokens_have_names_in_plain_text_and_as_digests(tmp_path: Path):
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    path = write(tmp_path / "t", f"# who\n\nalice:{ALICE}\n  bob:sha256:{digest}\n")
    tokens = TokensFile(path)
    assert tokens.name_of(ALICE) == "alice"
    assert tokens.name_of(BOB) == "bob"


@pytest.mark.parametrize("token", ["", "a", "a" * 31, "a" * 33, "c" * 32, "alice", "\udc80", "ä"])
def test_nothing_else_is_a_token(tmp_path: Path, token: str):
    assert TokensFile(write(tmp_path / "t", f"alice:{ALICE}\n")).name_of(token) is None


def test_the_digest_itself_is_no_token(tmp_path: Path):
    digest = hashlib.sha256(BOB.encode()).hexdigest()
    tokens = TokensFile(write(tmp_path / "t", f"bob:sha256:{digest}\n"))
    assert tokens.name_of(digest) is None
    assert tokens.name_of(f"sha256:{digest}") is None


def test_one_name_may_have_two_tokens_while_one_replaces_the_other(tmp_path: Path):
    tokens = TokensFile(write(tmp_path / "t", f"alice:{ALICE}\nalice:{BOB}\n"))
    assert tokens.name_of(ALICE) == tokens.name_of(BOB) == "alice"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no token"),
        ("# nothing\n", "holds no token"),
        ("x\n", "line 1: no name:token"),
        (f":{ALICE}", "line 1: a name has"),
        (f"a b:{ALICE}", "line 1: a name has"),
        (f"ok:{ALICE}\nalice:short", "line 2: a token has at least 32 characters"),
        ("alice:" + "a b" * 20, "a token has letters"),
        ("alice:sha256:zz", "64 lower-case hexadecimal digits"),
        (f"alice:{ALICE}\nbob:{ALICE}", "line 2: another name has this token"),
    ],
)
def test_a_bad_line_is_named_without_being_repeated(tmp_path: Path, text: str, problem: str):
    with pytest.raises(TokensFileError, match=problem) as caught:
        TokensFile(write(tmp_path / "t", text))
    assert ALICE not in str(caught.value)
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_a_file_open_to_every_user_is_refused(tmp_path: Path, mode: int):
    path = write(tmp_path / "t", f"alice:{ALICE}\n", mode)
    with pytest.raises(TokensFileError, match="chmod o-rw"):
        TokensFile(path)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(TokensFileError, match=r"cannot read .*/nothing: No such file"):
        TokensFile(tmp_path / "nothing")


def test_changes_count_from_the_next_call_on_and_broken_ones_do_not(tmp_path: Path):
    path = write(tmp_path / "t", f"alice:{ALICE}\n")
    tokens = TokensFile(path)
    os.replace(write(tmp_path / "new", f"bob:{BOB}\n"), path)
    assert tokens.name_of(ALICE) is None
    assert tokens.name_of(BOB) == "bob"
    os.replace(write(tmp_path / "new", "broken\n"), path)
    assert tokens.name_of(BOB) == "bob"
    os.replace(write(tmp_path / "new", f"alice:{ALICE}\n", 0o644), path)
    assert tokens.name_of(ALICE) is None


def test_every_entry_is_compared_in_constant_time_whichever_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokens = TokensFile(write(tmp_path / "t", f"alice:{ALICE}\nbob:{BOB}\ncarol:{'c' * 32}\n"))
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def record(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", record)
    for token in (ALICE, BOB, "wrong"):
        compared.clear()
        tokens.name_of(token)
        assert len(compared) == 3
