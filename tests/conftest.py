"""Set-up that all tests share."""

import os

# Idle OpenMP threads of one test would spin through the next one's time. Read once, by torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
