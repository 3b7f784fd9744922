"""``python -m liquidfusion.bench``: the same as the command ``liquidfusion-bench``."""

import sys

from liquidfusion.bench.cli import main

sys.exit(main())
