"""`python -m parco.cli` is `parco`."""

import sys

from parco.cli import main

sys.exit(main())
