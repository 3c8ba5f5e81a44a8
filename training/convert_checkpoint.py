"""Turn a checkpoint of the original project (a .pt file) into a model folder that AutoModel loads."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("convert_checkpoint")
