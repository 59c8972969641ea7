"""The command line; ``main`` is the program ``rmoe``."""

from rmoe_megatron.cli.app import main as main
