"""Networks and registries in; repositories, model cards and a static site out."""
