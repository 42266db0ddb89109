"""Save and load sparse models: small files of our own, and state dicts of others."""
