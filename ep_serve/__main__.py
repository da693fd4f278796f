"""`python -m ep_serve` is the `ep-serve` command."""

import sys

from ep_serve.cli import main

sys.exit(main())
