"""Surgery: a plan executed on a network, which becomes smaller or is masked with zeros."""
