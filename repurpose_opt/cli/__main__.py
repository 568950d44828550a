"""`python -m repurpose_opt.cli`."""

import sys

from repurpose_opt.cli import main

sys.exit(main())
