"""`jaxalign prepare`: what a method needs to know of a base before a run of it begins."""
