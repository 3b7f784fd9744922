"""Calls of a model: what one brings, who attends while it runs, and many requests side by side."""
