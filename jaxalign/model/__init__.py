"""One decoder for every family: its facts (`spec`), its layers, its stack."""
