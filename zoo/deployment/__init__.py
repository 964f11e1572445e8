"""Export networks to verified ONNX files, run these, and measure them."""
