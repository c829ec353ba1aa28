"""`python -m actcache`: the command line."""

import sys

from actcache.cli import main

if __name__ == "__main__":  # processes that this one starts import it again
    sys.exit(main())
