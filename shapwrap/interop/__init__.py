"""Wrapped models in other packages: captum, Quantus, shapiq."""
