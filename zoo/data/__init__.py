"""A data set's name, a folder or a Dataset in; batches of images out."""
