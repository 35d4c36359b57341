"""Odd and hostile inputs: every reader works or refuses in one sentence."""
