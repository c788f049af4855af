"""An artifact's part for ONNX Runtime: written, added, checked, planned, composed, scored.

`edgekit.onnx_part` is what the manifest tells of it; `edgekit.onnx_runtime` runs a model folder;
`edgekit.onnx_session` is a conversation.
"""
