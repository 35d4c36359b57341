"""How close a model's languages are: metrics on pooled states of parallel sentences."""
