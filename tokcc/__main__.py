"""``python -m tokcc`` is the program ``tokcc``."""

import sys

from tokcc.cli import main

sys.exit(main())
