"""Published files in and out: layouts, tensors, checks, the bundled model."""
