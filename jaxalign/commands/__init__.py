"""The commands: each a dataclass of its options that loads the configuration and runs its room."""
