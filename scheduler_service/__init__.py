"""The scheduler process: public API, queues, tokenization, KV block accounting and policy."""
