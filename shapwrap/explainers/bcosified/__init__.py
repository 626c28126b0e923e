"""B-cosified CLIP: an image tower that is a linear map of its input, made from a pretrained one."""
