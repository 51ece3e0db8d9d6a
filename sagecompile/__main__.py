"""`python -m sagecompile`, the same as the `sagecompile` command."""

import sys

from .cli import main

sys.exit(main())
