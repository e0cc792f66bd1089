"""HTTP: the OpenAI-compatible server over one engine (layer 8; never imports torch)."""
