"""Conversion between checkpoints and Hugging Face folders, tensor by tensor and without a GPU.

`to_hf.export_folder`, `from_hf.import_folder` and `verify.compare` are the three programs; `mapping` says which tensor
is which, and the other files read and write the two formats in bounded memory.
"""
