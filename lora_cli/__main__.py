"""`python -m lora_cli` and the `lora-cli` script."""

import sys

from lora_cli.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
