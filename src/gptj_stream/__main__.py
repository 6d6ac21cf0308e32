"""`python -m gptj_stream` is the `gptj` command."""

import sys

from gptj_stream.cli import main

sys.exit(main())
