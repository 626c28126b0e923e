"""Wrapped models on disk and on the hub: safetensors, a JSON that rebuilds them, a model card."""
