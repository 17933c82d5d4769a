"""The one logger. Messages go to stderr; results go to stdout and never through here."""

import logging

logger = logging.getLogger("lora_cli")
