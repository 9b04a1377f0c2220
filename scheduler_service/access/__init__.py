"""Who may call, encrypted or not, and what is kept apart between callers."""
