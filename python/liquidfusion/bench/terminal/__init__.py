"""What a person sees: progress on standard error, results on standard output."""
