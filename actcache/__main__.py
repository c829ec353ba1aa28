"""`python -m actcache`: the command line."""

import sys

from actcache.cli import main

sys.exit(main())
