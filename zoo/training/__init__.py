"""A network and data in; a trained network and its accuracy out."""
