"""Many measurements in one go: which ones (`cells`, `experiments`), and getting them done (`work`)."""
