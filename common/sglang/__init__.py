"""SGLang as the engine script uses it, with or without a GPU."""
