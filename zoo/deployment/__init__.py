"""A network in; a verified ONNX file, its runtime and its figures out."""
