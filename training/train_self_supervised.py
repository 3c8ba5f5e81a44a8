"""Train on documents alone: one part of each is the query for the other part."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("train_self_supervised")
