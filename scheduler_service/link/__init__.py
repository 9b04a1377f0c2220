"""The scheduler's end of the executor protocol."""
