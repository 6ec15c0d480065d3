"""`python -m atlas_rl …` is `atlas-rl …`."""

import sys

from atlas_rl.cli import command

sys.exit(command())
