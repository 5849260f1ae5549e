class Verification: pass
def verify_onnx(*a): pass
