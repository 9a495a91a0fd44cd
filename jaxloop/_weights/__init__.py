"""The weights of a model alone, as a safetensors file."""
