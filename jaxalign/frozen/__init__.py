"""A frozen weight as a pass sees it: its products, and how it is stored in 8 or 4 bits."""
