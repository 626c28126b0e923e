"""Backbones: one adapter a family, chosen by its parts and proved by numbers."""
