"""Python imports this when it starts: what an engine starts borrows prunus's packages too, after the engine's own."""

import os
import sys

sys.path += os.environ["PRUNUS_PACKAGES"].split(os.pathsep)
