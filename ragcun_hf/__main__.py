"""`python -m ragcun_hf` is `ragcun`, which also works under `accelerate launch -m`."""

from .cli import main

if __name__ == "__main__":
    main()
