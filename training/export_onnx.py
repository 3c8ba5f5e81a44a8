"""Write a trained model as one ONNX graph, in float32 and int8, for machines without PyTorch."""

from ragcun_hf.cli import run

if __name__ == "__main__":
    run("export_onnx")
