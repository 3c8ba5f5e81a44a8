"""Turn a file, a folder or a Hub dataset into the files that the training scripts read."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("prepare_data")
