"""Any pi0 / pi0.5 checkpoint as one table of vivace's names."""
