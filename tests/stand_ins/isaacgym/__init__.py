"""Stand-in for Isaac Gym, which refuses to be imported after torch.

It does so here only with STRICT_IMPORT_ORDER=1 in the environment, as the tests import
torch first.
"""

import os
import sys

if os.environ.get("STRICT_IMPORT_ORDER") == "1" and "torch" in sys.modules:
    message = (
        "PyTorch was imported before isaacgym modules.  Please import torch after them."
    )
    raise ImportError(message)
