"""Explanations to look at: one page without a network, and a page that explains dropped images."""
