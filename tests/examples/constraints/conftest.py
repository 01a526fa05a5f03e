# SPDX-License-Identifier: Apache-2.0
"""Examples are scripts that import their neighbours, so their folder must be on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "constraints"))
