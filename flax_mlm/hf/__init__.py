"""Hugging Face folders, read and written without torch or transformers."""
