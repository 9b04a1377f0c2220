"""Texts, chats and what they may cost."""

import asyncio
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_service.errors import InvalidFieldError
from scheduler_service.model_spec import ModelSpecError
from scheduler_service.text.chat_template import ChatRenderer
from scheduler_service.text.prompt_encoder import PromptEncoder
from scheduler_service.text.tokenizer import ChatTurn, Tokenizer
from scheduler_service.validation import ChatPrompt, Prompt, TextPrompt, TokenPrompt

TURNS = (ChatTurn("system", "Be brief."), ChatTurn("user", "Hi"))


def render(tokenizer: Tokenizer, template_kwargs_json: str = "", **options) -> str:
    options.setdefault("add_generation_prompt", True)
    return tokenizer.render_chat(TURNS, template_kwargs_json=template_kwargs_json, **options)


# One for all: to start its process takes longer than any test.
RENDERER = ChatRenderer()


def with_template(checkpoint: Path, directory: Path, template: str | None) -> Tokenizer:
    shutil.copytree(checkpoint, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    return Tokenizer(directory, RENDERER)


@given(st.text(max_size=30))
def test_any_text_survives_the_way_there_and_back(tokenizer: Tokenizer, text: str):
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == text
    assert tokenizer.least_num_tokens(text) <= len(token_ids)


def test_special_tokens_are_left_out_of_text_only_if_asked(tokenizer: Tokenizer):
    token_ids = tokenizer.encode("a<|im_end|>")
    assert token_ids[-1] == 258
    assert tokenizer.decode(token_ids) == "a"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "a<|im_end|>"


def test_a_truncation_saved_with_the_tokenizer_is_not_applied(checkpoint: Path, tmp_path: Path):
    directory = shutil.copytree(checkpoint, tmp_path / "truncating")
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    path.write_text(json.dumps(content))
    assert len(Tokenizer(directory).encode("a long text")) == 11


def test_a_chat_is_rendered_with_or_without_the_header_of_an_answer(tokenizer: Tokenizer):
    chat = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(tokenizer) == chat + "<|im_start|>assistant\n"
    assert render(tokenizer, add_generation_prompt=False) == chat


def test_template_variables_reach_the_template(checkpoint: Path, tmp_path: Path):
    tokenizer = with_template(
        checkpoint, tmp_path / "m", "{{ 'think' if enable_thinking else 'answer' }}"
    )
    assert render(tokenizer, '{"enable_thinking": true}') == "think"
    assert render(tokenizer) == "answer"


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ("{", "no valid JSON"),
        ("[1]", "must be a JSON object"),
        ('{"tokenize": true}', "tokenize cannot be set here"),
        ('{"chat_template": "x"}', "chat_template cannot be set here"),
        ("[" * 100_000, "nested too deeply|no valid JSON"),
    ],
)
def test_bad_template_variables_are_refused(tokenizer: Tokenizer, kwargs: str, problem: str):
    with pytest.raises(InvalidFieldError, match=problem) as caught:
        render(tokenizer, kwargs)
    assert caught.value.field == "chat.template_kwargs_json"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].nothing.here }}", "refused it"),
        ("{{ 1 + 'a' }}", "cannot render it"),
        ("{{ 1 // 0 }}", "cannot render it"),
        ("{% if %}", "refused it"),
    ],
)
def test_a_template_that_fails_refuses_the_chat(
    checkpoint: Path, tmp_path: Path, template: str, problem: str
):
    tokenizer = with_template(checkpoint, tmp_path / "m", template)
    with pytest.raises(InvalidFieldError, match=problem) as caught:
        render(tokenizer)
    assert caught.value.field == "chat"


def test_a_model_without_a_template_says_what_to_send_instead(checkpoint: Path, tmp_path: Path):
    tokenizer = with_template(checkpoint, tmp_path / "m", None)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidFieldError, match="send text instead"):
        render(tokenizer)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_directory_without_a_usable_tokenizer_is_refused(tmp_path: Path, content: str | None):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelSpecError, match="tokenizer"):
        Tokenizer(tmp_path)


def encode(tokenizer: Tokenizer, prompt: Prompt, max_tokens: int = 20) -> list[int]:
    encoder = PromptEncoder(tokenizer)
    try:
        return asyncio.run(encoder.encode(prompt, max_tokens=max_tokens))
    finally:
        encoder.close()


def test_prompts_of_each_kind_become_token_ids(tokenizer: Tokenizer):
    assert encode(tokenizer, TokenPrompt([5, 6])) == [5, 6]
    assert encode(tokenizer, TextPrompt("ab")) == tokenizer.encode("ab")
    chat = ChatPrompt(TURNS, True, "")
    token_ids = encode(tokenizer, chat, max_tokens=100)
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == render(tokenizer)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (TokenPrompt([1] * 21), "token_ids"),
        (TextPrompt("a" * 21), "text"),
        (ChatPrompt(TURNS, True, ""), "chat"),
    ],
)
def test_a_prompt_that_is_too_long_is_refused_by_field(
    tokenizer: Tokenizer, prompt: Prompt, field: str
):
    with pytest.raises(InvalidFieldError, match="takes at most 20") as caught:
        encode(tokenizer, prompt)
    assert caught.value.field == field


def test_a_text_far_too_long_is_refused_without_being_tokenized(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
):
    def refuse(text: str, **options) -> list[int]:
        raise TimeoutError("this would have taken seconds")

    monkeypatch.setattr(tokenizer, "encode", refuse)
    with pytest.raises(InvalidFieldError, match="has at least"):
        encode(tokenizer, TextPrompt("a" * 10_000))


def test_a_text_without_tokens_is_refused(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: [])
    with pytest.raises(InvalidFieldError, match="no tokens"):
        encode(tokenizer, TextPrompt("x"))
