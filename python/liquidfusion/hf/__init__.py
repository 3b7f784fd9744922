"""What transformers and users touch: the cache, its layers, the attention function, and how a model finds them."""
