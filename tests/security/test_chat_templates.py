"""Templates that go too far hurt their own rendering and nothing else; so do template variables."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from scheduler_service.errors import InvalidFieldError
from scheduler_service.model_spec import ModelSpecError
from scheduler_service.text.chat_template import ChatRenderer, TemplateError
from scheduler_service.text.template_worker import MAX_RENDERED_CHARS
from scheduler_service.text.tokenizer import (
    MAX_TEMPLATE_CHARS,
    MAX_TEMPLATE_KWARGS_BYTES,
    MAX_TEMPLATE_KWARGS_DEPTH,
    ChatTurn,
    Tokenizer,
)

HARMLESS = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatRenderer]:
    # Enough for all that is harmless here, little for a machine that is busy with other things.
    shared = ChatRenderer(max_cpu_s=0.3)
    yield shared
    shared.close()


def render(renderer: ChatRenderer, template: str, **variables: object) -> str:
    return renderer.render(template, MESSAGES, variables, add_generation_prompt=True)


ENDLESS = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
)
LARGE = (
    "{{ 'a' * 10**11 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ ('%1000000000d' % 1) }}",
    "{{ ('a' * 10**8) ~ ('b' * 10**8) ~ ('c' * 10**8) ~ ('d' * 10**8) ~ ('e' * 10**8) }}",
    "{% set ns = namespace(s='aa') %}{% for i in range(99) %}"
    "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
)


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_without_an_end_is_stopped(renderer: ChatRenderer, template: str):
    with pytest.raises(TemplateError, match="too much time or memory"):
        render(renderer, template)
    assert render(renderer, HARMLESS) == "user: Hi"


@pytest.mark.parametrize("template", LARGE)
def test_a_template_that_takes_all_memory_is_stopped(renderer: ChatRenderer, template: str):
    with pytest.raises(TemplateError, match="too much"):
        render(renderer, template)
    assert render(renderer, HARMLESS) == "user: Hi"


def test_an_output_beyond_the_limit_is_refused(renderer: ChatRenderer):
    with pytest.raises(TemplateError, match=f"more than {MAX_RENDERED_CHARS}"):
        # Of a message, because Jinja would compile a constant of that length, which takes a second.
        render(renderer, f"{{{{ messages[0].content * {MAX_RENDERED_CHARS} }}}}")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__self__.__class__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ lipsum.__globals__.os.name }}",
        "{% set _ = messages.append({}) %}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_stays_in_the_sandbox(renderer: ChatRenderer, template: str):
    with pytest.raises(TemplateError):
        render(renderer, template)


def test_a_worker_has_no_secrets_of_the_scheduler_in_its_environment(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    renderer = ChatRenderer()
    assert render(renderer, HARMLESS) == "user: Hi"
    (worker,) = renderer._idle
    environment = Path(f"/proc/{worker._process.pid}/environ").read_bytes()
    renderer.close()
    assert b"TZ=Asia/Tokyo" in environment
    assert b"secret" not in environment


def test_others_render_while_one_template_hangs(renderer: ChatRenderer):
    with ThreadPoolExecutor(1) as threads:
        hanging = threads.submit(render, renderer, ENDLESS[0])
        assert render(renderer, HARMLESS) == "user: Hi"
        assert isinstance(hanging.exception(timeout=60), TemplateError)


def test_text_of_every_kind_goes_through_unchanged(renderer: ChatRenderer):
    text = "\n\r\t\0\"'\\ ä 漢 \U0001f600 {{ x }} </s>"
    messages = [{"role": "user", "content": text}]
    rendered = renderer.render(HARMLESS, messages, {}, add_generation_prompt=False)
    assert rendered == f"user: {text}"


def test_half_a_surrogate_pair_in_a_variable_is_refused(renderer: ChatRenderer):
    with pytest.raises(TemplateError, match="surrogate"):
        render(renderer, "{{ x }}", **json.loads('{"x": "\\ud800"}'))
    assert render(renderer, HARMLESS) == "user: Hi"


def test_a_renderer_that_is_closed_leaves_no_process():
    renderer = ChatRenderer()
    renderer.warm_up()
    assert render(renderer, HARMLESS) == "user: Hi"
    (worker,) = renderer._idle
    renderer.close()
    assert worker._process.returncode is not None
    assert renderer._idle == []


def refused(tokenizer: Tokenizer, kwargs: str) -> str:
    with pytest.raises(InvalidFieldError) as caught:
        tokenizer.render_chat(
            [ChatTurn("user", "Hi")], add_generation_prompt=True, template_kwargs_json=kwargs
        )
    assert caught.value.field == "chat.template_kwargs_json"
    return caught.value.description


def test_template_variables_are_bounded_in_size_and_depth(tokenizer: Tokenizer):
    large = json.dumps({"x": "a" * MAX_TEMPLATE_KWARGS_BYTES})
    assert "at most" in refused(tokenizer, large)
    deep = '{"x": ' + "[" * MAX_TEMPLATE_KWARGS_DEPTH + "]" * MAX_TEMPLATE_KWARGS_DEPTH + "}"
    assert "nested too deeply" in refused(tokenizer, deep)
    assert "continue_final_message" in refused(tokenizer, '{"continue_final_message": true}')
    for name in ("messages", "conversations", "return_assistant_tokens_mask"):
        assert "cannot be set here" in refused(tokenizer, json.dumps({name: 1}))


def test_a_template_of_unreasonable_size_is_refused_at_start(checkpoint: Path, tmp_path: Path):
    directory = shutil.copytree(checkpoint, tmp_path / "large")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = "a" * (MAX_TEMPLATE_CHARS + 1)
    path.write_text(json.dumps(config))
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(ModelSpecError, match="at most"):
        Tokenizer(directory)


def test_code_in_a_checkpoint_is_not_run(checkpoint: Path, tmp_path: Path):
    directory = shutil.copytree(checkpoint, tmp_path / "hostile")
    marker = tmp_path / "it-ran"
    code = f"open({str(marker)!r}, 'w').close()\nclass Hostile: pass\n"
    for name in ("tokenization_hostile.py", "configuration_hostile.py", "modeling_hostile.py"):
        (directory / name).write_text(code)
    for name, auto_map in (
        ("tokenizer_config.json", {"AutoTokenizer": [None, "tokenization_hostile.Hostile"]}),
        ("config.json", {"AutoConfig": "configuration_hostile.Hostile"}),
    ):
        path = directory / name
        content = json.loads(path.read_text()) | {"auto_map": auto_map}
        if name == "tokenizer_config.json":
            content["tokenizer_class"] = "Hostile"
        path.write_text(json.dumps(content))
    tokenizer = Tokenizer(directory)
    assert tokenizer.decode(tokenizer.encode("a")) == "a"
    assert not marker.exists()
