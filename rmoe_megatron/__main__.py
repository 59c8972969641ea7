"""``python -m rmoe_megatron`` is ``rmoe``."""

from rmoe_megatron.cli import main

if __name__ == "__main__":
    main()
