"""`python -m train`: the same as `tsdiff train`."""

import typer

from train.cli import train

if __name__ == "__main__":
    typer.run(train)
