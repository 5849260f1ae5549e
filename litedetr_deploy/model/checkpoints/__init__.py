"""State dicts in: one file a dialect, each a list of (their key, our key) that is read both ways."""
