"""Adapters of one base combined into one: the algebra, the command, weights chosen by a score."""
