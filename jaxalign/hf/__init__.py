"""Hugging Face folders in and out: bases, PEFT adapters and the one table of tensor names."""
