"""``python -m GradProjIOLib`` is the command ``gradprojio``."""

import sys

from GradProjIOLib.cli import main

sys.exit(main())
