"""Runnable examples of every kind of client; docs/clients.md explains them."""
