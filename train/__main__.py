"""`python -m train`: the same as `tsdiff train`."""

import sys

from tsdiff.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
