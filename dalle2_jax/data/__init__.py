"""Captioned images: the emoji set, TFDS directories and folders, as batches of numpy arrays."""
