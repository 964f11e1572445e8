"""Read networks from checkpoints and folders, and write them."""
