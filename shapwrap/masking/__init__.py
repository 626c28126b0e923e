"""Masking: what it means that a patch is absent."""
