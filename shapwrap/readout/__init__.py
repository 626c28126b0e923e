"""Readout: what each patch is worth, from the pretrained head."""
