"""The way back to PyTorch: adapters and models out, adapters trained elsewhere in, both checked."""
