"""A network and an example input in; verified channel groups out."""
