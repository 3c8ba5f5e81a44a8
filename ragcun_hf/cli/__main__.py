"""`python -m ragcun_hf.cli` is `ragcun`, which also works under `accelerate launch -m`."""

from . import main

if __name__ == "__main__":
    main()
