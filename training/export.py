"""Write a trained model for other libraries: as an ONNX graph, or as a plain folder of sentence-transformers."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("export")
