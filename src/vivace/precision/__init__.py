"""Which tensor is in which format."""
