"`python -m cpcl.cli` and `torchrun -m cpcl.cli` are the command `cpcl`."

import sys

from cpcl.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
