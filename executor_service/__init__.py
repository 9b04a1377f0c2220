"""The executor process: runs the model over the paged KV cache, steered by plans."""
