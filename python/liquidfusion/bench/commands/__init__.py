"""One module for each command: its options, and what it prints. None of them imports torch before it runs."""
