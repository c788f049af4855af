"""Codecs turn a weight into a stack of levels and back."""
