"""Files for other runtimes: GGUF and its parts."""
