"""The definition of pi0 and pi0.5 in plain PyTorch: one forward, no hardware or precision words."""
