"""What is computed over keys and values: plain functions of tensors, which know neither caches nor calls."""
