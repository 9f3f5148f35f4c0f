"""Will a program fit a TPU slice, how fast could it be: told by the TPU compiler, without a TPU."""
