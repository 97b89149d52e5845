"""Deployment: takes a model and writes a folder of ONNX graphs or TensorRT engines; opens it as a session.

The commands import this package. Sessions serve with ``runtime`` alone.
"""
