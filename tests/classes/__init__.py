"""Every language model class of the installed transformers, built small, with a KVCache."""
