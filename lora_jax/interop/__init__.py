"""Reading and writing the file formats other libraries use."""
