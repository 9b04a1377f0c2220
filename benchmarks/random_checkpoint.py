"""Makes a checkpoint with random weights in the exact shape of a model that cannot be downloaded.

Speed does not depend on what the weights say, so benchmarks on such a checkpoint stand for the real
one. The tokenizer has one entry per id, so that detokenization does its full work too.

    python -m benchmarks.random_checkpoint --shape qwen3-0.6b DIRECTORY
"""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Qwen3Config, Qwen3ForCausalLM

#: Fields of config.json, as the models of that name have them.
SHAPES = {
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "eos_token_id": 151_645,
        "bos_token_id": 151_643,
    },
}


def make_random_checkpoint(directory: Path, shape: str, seed: int = 0) -> Path:
    """Writes weights in bfloat16, config and tokenizer; returns `directory`."""
    config = Qwen3Config(**SHAPES[shape])
    torch.manual_seed(seed)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(default_dtype)
    model.save_pretrained(directory)
    _write_tokenizer(directory, config.vocab_size)
    return directory


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Byte-level BPE whose entries beyond single bytes are short words that no merge produces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    for index in range(len(vocab), vocab_size):
        word, rest = "Ġ", index
        while rest:
            rest, letter = divmod(rest, len(letters))
            word += letters[letter]
        vocab[word] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_random_checkpoint(arguments.directory, arguments.shape, arguments.seed))


if __name__ == "__main__":
    main()
