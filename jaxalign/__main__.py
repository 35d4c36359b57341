"""`python -m jaxalign` is `jaxalign`."""

import sys

from jaxalign.cli import main

sys.exit(main())
