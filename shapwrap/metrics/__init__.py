"""Metrics: how far explanations can be trusted, for any model and any map."""
