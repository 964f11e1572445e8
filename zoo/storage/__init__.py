"""Checkpoints and folders in, networks out; and the other way round."""
