"""Train networks on data, and measure their accuracy."""
