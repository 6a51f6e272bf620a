"""all-MiniLM-L6-v2 on the CPU without torch: files, network in ONNX or numpy, embedder."""
