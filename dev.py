"""The two commands of the README, on a bare machine: `python dev.py demo`, `python dev.py test`.

Standard library only. `python dev.py --help` lists everything; the work is done in `dev/`.
"""

import sys

if sys.version_info < (3, 10):  # kept first, and free of newer syntax
    sys.exit("dev.py needs Python 3.10 to 3.14, but this is Python " + sys.version.split()[0] + ".")

from dev.cli import main  # the package dev/, which takes precedence over this file

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
