"""Share a trained model: model cards rendered from results, uploads to the Hub, ONNX exports."""
