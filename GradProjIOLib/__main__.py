"""``python -m GradProjIOLib`` is the command ``gradprojio``."""

import sys

from GradProjIOLib.commands.main import main

sys.exit(main())
