"""Several systems trained on one base, measured alike and put side by side: `jaxalign compare`."""
