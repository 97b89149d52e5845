"""A model -> a folder of ONNX graphs and TensorRT engines with a manifest; sessions run it with reuse."""
