"""OpenAI's chat completions: what a client may send, what it gets, and the document that says so."""
