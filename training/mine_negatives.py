"""Add hard negatives to pairs: documents that the encoder ranks high, but that do not answer the query."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("mine_negatives")
