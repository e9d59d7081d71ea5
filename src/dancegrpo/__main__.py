"""`python -m dancegrpo`."""

from dancegrpo.cli import main

if __name__ == "__main__":
    main()
