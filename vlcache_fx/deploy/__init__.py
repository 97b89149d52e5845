"""Exported graphs: ONNX, TensorRT engines, and sessions that run them with reuse."""
