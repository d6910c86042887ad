"""Robot data <-> model space, on the host, in numpy: images, normalisation, prompts, tokens."""
