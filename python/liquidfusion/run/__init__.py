"""Calls of a model: what one brings, and who attends while it runs."""
