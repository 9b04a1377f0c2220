"""The model: configuration, checkpoint loading, layers, paged KV cache, attention and sampling.

Nothing here knows about gRPC, plans or slots; the executor drives it one `ForwardBatch` at a time.
"""
