"""`python -m omniadam`, where the script's folder is not on the PATH."""

from omniadam.cli import main

if __name__ == "__main__":
    main()
