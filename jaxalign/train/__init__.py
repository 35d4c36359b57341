"""Training: `loop.py` is the algorithm, `step.py` one update of it."""
