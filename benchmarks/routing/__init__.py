"""Strategies that choose among several executors, compared on a virtual clock."""
