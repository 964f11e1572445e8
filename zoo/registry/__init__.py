"""A reference (bundled, file, Hub) in; a profile or stored channel groups out."""
