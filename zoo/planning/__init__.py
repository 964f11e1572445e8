"""Channel groups and a request in; how many channels each group keeps out."""
