"""A network and a plan in; a smaller network, or one with zeros, out."""
