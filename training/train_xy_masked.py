"""Train to predict a text from a masked copy of itself."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("train_xy_masked")
