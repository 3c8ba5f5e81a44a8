"""Train on query-document pairs with contrastive + isotropy + predictive terms."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("train_contrastive")
