"""An ONNX model -> an engine for the machine that it will run on: TensorRT 10.3 to 11.x and TensorRT-RTX."""
