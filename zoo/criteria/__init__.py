"""A network and its channel groups in; a score for every channel out."""
