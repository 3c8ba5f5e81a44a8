"""Try many settings of the head on the same cached features, and say which are worth it."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("sweep")
