"""What a cache holds: slots, the ledger beside them, and both in a file."""
