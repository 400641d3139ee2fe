"""`python -m ddpcall` is `ddpcall`."""

from ddpcall.cli import main

if __name__ == "__main__":
    main()
