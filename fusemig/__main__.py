"""``python -m fusemig``."""

from fusemig.cli import main

if __name__ == "__main__":
    main()
