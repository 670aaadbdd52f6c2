"""Leaf operations: tensors and process groups in, tensors out. A fast one keeps a plain twin under the same name."""
