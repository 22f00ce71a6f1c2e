"""``python -m launch`` is ``freewheel``."""

from launch.cli import main

if __name__ == "__main__":
    main()
