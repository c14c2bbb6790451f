"""Run ddcache from a checkout: `python cli.py --help`."""

from ddcache.cli import main

if __name__ == "__main__":
    main()
