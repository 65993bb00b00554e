"""`python -m mcore_bridge` is `mcore-bridge`."""

import sys

from .cli.main import main

sys.exit(main())
