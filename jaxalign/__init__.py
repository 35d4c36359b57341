"""jaxalign: fine-tuned LLMs for the languages their task data does not cover."""

__version__ = "0.1.0"
